"""Starts workers of tests from one process that has imported TensorFlow already.

An import of TensorFlow takes three to six seconds of a core, and the tests start some hundreds of
workers. `python forkserver.py` imports it once and then forks a process for every request; nothing
has been computed in it by then, so a worker finds TensorFlow as after its own import. (README's
commands, which CI runs, and the tests of the launcher start workers the ordinary way.)

Requests come as JSON lines on stdin, answers leave as JSON lines on stdout: {"started": number,
"pid": pid} and {"ended": number, "status": as of subprocess}. At the end of stdin all workers are
killed.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02
_ANSWER_SECONDS = 120.0


class ForkServer:
    """The process that forks, seen from the tests.

    Args:
        environment: Of the process; what a worker is given comes on top of it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._changed = threading.Condition()
        self._pids: dict[int, int] = {}
        self._statuses: dict[int, int] = {}
        self._requests = 0
        self._is_over = False
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], directory: Path, log: Path
    ) -> "ForkedProcess":
        """Runs a script in a new process.

        Args:
            arguments: Path of the script and what follows it.
            environment: Changes of the server's environment.
            directory: Where it runs.
            log: What it prints is appended to this file.

        Raises:
            RuntimeError: If the server has ended.
        """
        with self._changed:
            self._requests += 1
            number = self._requests
            request = {
                "number": number,
                "arguments": list(arguments),
                "environment": dict(environment),
                "directory": str(directory),
                "log": str(log),
            }
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            come = self._changed.wait_for(
                lambda: number in self._pids or self._is_over, _ANSWER_SECONDS
            )
            if not come or self._is_over:
                raise RuntimeError(f"the fork server has ended ({self._process.poll()}) or hangs")
            return ForkedProcess(self, number, self._pids[number])

    def status(self, number: int, timeout: float = 0.0) -> int | None:
        """Returns the exit status of what a request has started, None while it runs."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._statuses or self._is_over, timeout)
            if number not in self._statuses and self._is_over:
                raise RuntimeError("the fork server has ended")
            return self._statuses.get(number)

    def close(self) -> None:
        """Ends the server and what it has started."""
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            answer = json.loads(line)
            with self._changed:
                if "started" in answer:
                    self._pids[answer["started"]] = answer["pid"]
                else:
                    self._statuses[answer["ended"]] = answer["status"]
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class ForkedProcess:
    """A worker; has what tests use of `subprocess.Popen`.

    Args:
        server: What has started it.
        number: Of the request.
        pid: Its process id.
    """

    def __init__(self, server: ForkServer, number: int, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._number = number

    @property
    def returncode(self) -> int | None:
        """The exit status, None while it runs."""
        return self._server.status(self._number)

    def poll(self) -> int | None:
        """Returns the exit status, None while it runs."""
        return self.returncode

    def wait(self, timeout: float = 30.0) -> int:
        """Waits for the end."""
        status = self._server.status(self._number, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the process."""
        self.send_signal(signal.SIGKILL)


def _serve() -> dict[str, Any] | None:
    """Forks until stdin ends; returns the request in a new process, None in the server."""
    import tensorflow as tf

    import tf_syncdist

    # These are imported at their first use. gRPC begins nothing before that.
    tf.keras.Model, tf_syncdist.SyncReplicasStrategy, tf_syncdist.callbacks  # noqa: B018
    # Workers need not look for garbage among some million objects again and again, nor copy them.
    gc.collect()
    gc.freeze()
    unread = b""
    children: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
        if readable:
            data = os.read(0, 1 << 16)
            if not data:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return None
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    return request
                children[pid] = request["number"]
                print(json.dumps({"started": request["number"], "pid": pid}), flush=True)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                print(json.dumps({"ended": children.pop(pid), "status": code}), flush=True)


def _become(request: dict[str, Any]) -> None:
    """Turns a fork of the server into what `python SCRIPT ARGUMENTS` would be."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    os.chdir(request["directory"])
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if (found := _serve()) is not None:
        _become(found)
