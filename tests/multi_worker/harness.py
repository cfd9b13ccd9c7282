"""Runs a job of several processes for a test and gathers what they have written.

`run_job` starts one process per task of a cluster on this machine, all running the same script of
`programs/` with the same JSON arguments, and waits for their end. Each worker writes
`worker-I.json` (see `programs/task.py`); what a task prints goes to a file. Nothing is left behind.
"""

import atexit
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tf_syncdist
from tf_syncdist.cluster.ports import reserve_ports

from .forkserver import ForkedProcess, ForkServer

_PROGRAMS = Path(__file__).parent / "programs"
_ROOT = Path(tf_syncdist.__file__).parents[1]
_MARK = "TF_SYNCDIST_TEST_JOB"
_TAIL_LINES = 80
# Several workers share two cores.
_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "2",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(_ROOT),
}


class JobResult(NamedTuple):
    """What a job left behind. Tasks are called "worker 0", "ps 0" and so on.

    Args:
        results: What each worker wrote, by the index of the worker.
        logs: What each task printed.
        ended: When each task ended, in seconds after the first start.
        addresses: The cluster.
        directory: Where the tasks have run.
    """

    results: dict[int, dict[str, Any]]
    logs: dict[str, str]
    ended: dict[str, float]
    addresses: dict[str, list[str]]
    directory: Path

    def each(self, *path: str) -> list[Any]:
        """Returns one item of every worker's result, in the order of the workers."""
        found = []
        for _, value in sorted(self.results.items()):
            for name in path:
                value = value[name]
            found.append(value)
        return found

    def common(self, *path: str) -> Any:
        """Returns an item that is the same in every worker's result."""
        values = self.each(*path)
        assert values, "no worker has written a result"
        assert all(v == values[0] for v in values), f"workers differ in {path}: {values}"
        return values[0]


def run_job(
    program: str,
    directory: Path,
    *,
    workers: int,
    ps: int = 0,
    arguments: Mapping[str, Any] | None = None,
    seconds: float = 240.0,
    statuses: Mapping[str, int] | None = None,
    start: Sequence[str] | None = None,
    ps_runs_program: bool = False,
    environment: Mapping[str, str] | None = None,
) -> JobResult:
    """Runs a program in every task of a cluster and waits for the end of all of them.

    Args:
        program: Name of a file in `programs/`.
        directory: Where results and logs are written.
        workers: How many workers the cluster has; 0 for one process without a cluster.
        ps: How many `ps` tasks it has.
        arguments: Given to the program as JSON.
        seconds: How long the job may take.
        statuses: Expected exit status of tasks that do not end with 0; their results are optional.
        start: The tasks that are started, if not all.
        ps_runs_program: Whether a `ps` task runs the program too, as opposed to
            `python -m tf_syncdist.aggregator`.
        environment: Environment variables of all tasks.

    Returns:
        A `JobResult`.

    Raises:
        AssertionError: If a task does not end in time, or not with the expected status, or writes
            no result, or leaves a process behind. The message has the ends of all logs.
    """
    with contextlib.ExitStack() as stack:
        ports = stack.enter_context(reserve_ports(workers + ps))
        addresses = [f"127.0.0.1:{port.port}" for port in ports]
        cluster = {"worker": addresses[:workers]} | ({"ps": addresses[workers:]} if ps else {})
        for port in ports:
            port.release()
        job = _Job(directory, cluster, statuses or {}, environment or {})
        stack.callback(job.kill)
        argument = json.dumps({"directory": str(directory), **(arguments or {})})
        command = [str(_PROGRAMS / program), argument]
        for task_type, tasks in cluster.items():
            for index, address in enumerate(tasks):
                if start is None or f"{task_type} {index}" in start:
                    port_flag = f"--port={address.rpartition(':')[2]}"
                    service = ["-m", "tf_syncdist.aggregator", port_flag]
                    is_service = task_type == "ps" and not ps_runs_program
                    job.start(task_type, index, service if is_service else command)
        if not workers:
            job.start("worker", 0, command)
        job.wait(seconds)
        return JobResult(job.results(), job.logs(), job.ended, cluster, directory)


class Jobs:
    """Jobs of one program, two at a time: the processes of a job often wait for each other.

    Not for tests that look at how long something takes.

    Args:
        program: Name of a file in `programs/`, for jobs that name no other.
        directories: Makes a directory for each job.
        jobs: By name, what `run_job` is given for each job.
    """

    def __init__(
        self,
        program: str,
        directories: pytest.TempPathFactory,
        jobs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(2)
        self._started = {
            name: self._pool.submit(
                run_job,
                directory=directories.mktemp(name),
                **{"program": program, "seconds": 400.0, **job},
            )
            for name, job in jobs.items()
        }

    def __getitem__(self, name: str) -> JobResult:
        """Waits for a job."""
        return self._started[name].result()

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Job:
    """The processes of a job.

    Args:
        directory: Where results and logs are written.
        cluster: Addresses of all tasks.
        statuses: Expected exit statuses other than 0.
        environment: Environment variables of all tasks.
    """

    def __init__(
        self,
        directory: Path,
        cluster: dict[str, list[str]],
        statuses: Mapping[str, int],
        environment: Mapping[str, str],
    ) -> None:
        self.ended: dict[str, float] = {}
        self._directory = directory
        self._cluster = cluster
        self._statuses = statuses
        self._environment = dict(environment)
        self._mark = uuid.uuid4().hex
        self._processes: dict[str, subprocess.Popen | ForkedProcess] = {}
        self._started_at = time.monotonic()

    def start(self, task_type: str, index: int, arguments: list[str]) -> None:
        """Starts a task; a module by Python itself, a script by the fork server."""
        env = self._environment | {_MARK: self._mark}
        if any(self._cluster.values()):
            task = {"type": task_type, "index": index}
            env["TF_CONFIG"] = json.dumps({"cluster": self._cluster, "task": task})
        name = f"{task_type} {index}"
        if arguments[0] != "-m":
            log = self._log(name)
            log.touch()
            self._processes[name] = fork_server().start(arguments, env, self._directory, log)
            return
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self._directory,
                env=environment() | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Waits for the end of all tasks."""
        deadline = self._started_at + seconds
        while len(self.ended) < len(self._processes):
            for name, process in self._processes.items():
                if name not in self.ended and process.poll() is not None:
                    self.ended[name] = time.monotonic() - self._started_at
                    if process.returncode != self._statuses.get(name, 0):
                        self._fail(f"{name} has ended with status {process.returncode}")
            if time.monotonic() > deadline:
                self._fail(f"the job has not ended within {seconds:g} s")
            time.sleep(0.05)
        deadline = time.monotonic() + 30
        while (left := self._living()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            self._fail(f"processes were left behind: {left}")

    def results(self) -> dict[int, dict[str, Any]]:
        """Returns what the workers have written."""
        found = {}
        for name in self._processes:
            task_type, index = name.split()
            path = self._directory / f"worker-{index}.json"
            if task_type != "worker" or (name in self._statuses and not path.exists()):
                continue
            if not path.exists():
                self._fail(f"{name} has written no result")
            found[int(index)] = json.loads(path.read_text())
        return found

    def logs(self) -> dict[str, str]:
        """Returns what the tasks have printed so far."""
        return {name: self._log(name).read_text(errors="replace") for name in self._processes}

    def kill(self) -> None:
        """Ends what is still there."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            process.wait()
        for pid in self._living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _fail(self, why: str) -> None:
        running = {n: p for n, p in self._processes.items() if p.poll() is None}
        for process in running.values():
            process.send_signal(signal.SIGABRT)  # Python's fault handler prints where it is.
        for process in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        tails = [
            f"---- {name} ({'was running' if name in running else 'ended'}) ----\n"
            + "\n".join(log.splitlines()[-_TAIL_LINES:])
            for name, log in self.logs().items()
        ]
        still = ", ".join(running) or "none"
        raise AssertionError("\n".join([f"{why}; still running: {still}", *tails]))

    def _log(self, name: str) -> Path:
        return self._directory / f"{name.replace(' ', '-')}.log"

    def _living(self) -> dict[int, str]:
        """Returns the processes of this job that are alive, also those that tasks have started."""
        found = {}
        mark = f"{_MARK}={self._mark}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace")
        return found


def environment() -> dict[str, str]:
    """Returns the environment of a task, without what is its own."""
    return {k: v for k, v in os.environ.items() if k != "TF_CONFIG"} | _ENVIRONMENT


_servers: list[ForkServer] = []
_server_lock = threading.Lock()


def fork_server() -> ForkServer:
    """Returns the process that starts the workers of all tests."""
    with _server_lock:
        if not _servers:
            _servers.append(ForkServer(environment()))
            atexit.register(_servers[0].close)
        return _servers[0]
