"""Starts the worker processes of one cluster on this machine and collects their results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.02
# Enough for the others to report their own view of a failure before they are killed.
_FAILURE_GRACE_SECONDS = 3.0
# A worker gives up before it is killed, so that a hung one can print its stacks.
_WORKER_TIMEOUT_SHARE = 0.9
_LOG_TAIL_LINES = 40


class ClusterFailedError(RuntimeError):
    """A worker process failed or the cluster did not end in time; the text has the log."""


@dataclasses.dataclass(frozen=True)
class WorkerOutcome:
    """What one worker process left: the object in its result file and its exit time."""

    result: dict[str, Any]
    exited_at: float


@dataclasses.dataclass
class _Worker:
    """One started worker process and its files."""

    index: int
    process: subprocess.Popen[bytes]
    log_file: pathlib.Path
    result_file: pathlib.Path
    exited_at: float | None = None

    def poll(self) -> bool:
        """Notes the time of the exit and returns whether the process has exited."""
        if self.exited_at is None and self.process.poll() is not None:
            self.exited_at = time.time()
        return self.exited_at is not None

    def kill(self) -> None:
        """Ends the process and the children it left, which are in the process group of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    def log_tail(self) -> str:
        """Returns the last lines the process printed."""
        lines = self.log_file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(f"  | {line}" for line in lines)


def run_cluster(
    module: str, worker_flags: Sequence[Sequence[str]], timeout_seconds: float
) -> list[WorkerOutcome]:
    """Runs `python -m module` once per entry of worker_flags, as the workers of one cluster.

    Each process finds its place in TF_CONFIG and additionally gets --result_file, where it has
    to write a JSON object, and --give_up_at, the time.time() at which it has to exit by itself.

    Raises:
      ClusterFailedError: a process failed, wrote no result or did not end in time.
    """
    deadline = time.monotonic() + timeout_seconds
    give_up_at = time.time() + timeout_seconds * _WORKER_TIMEOUT_SHARE
    addresses = _free_addresses(len(worker_flags))
    with tempfile.TemporaryDirectory(prefix="straggler_benchmark_") as directory:
        workers: list[_Worker] = []
        try:
            for index, flags in enumerate(worker_flags):
                flags = [*flags, f"--give_up_at={give_up_at}"]
                workers.append(_start(module, index, addresses, flags, pathlib.Path(directory)))
            _wait(workers, deadline, timeout_seconds)
            return [_outcome(worker) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()


def _free_addresses(count: int) -> list[str]:
    """Returns addresses on this machine whose ports were free a moment ago."""
    with contextlib.ExitStack() as stack:
        # All are open at the same time, otherwise the same port could be returned twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]


def _start(
    module: str,
    index: int,
    addresses: Sequence[str],
    flags: Sequence[str],
    directory: pathlib.Path,
) -> _Worker:
    """Starts worker `index` with its output going to a file."""
    log_file = directory / f"worker_{index}.log"
    result_file = directory / f"worker_{index}.json"
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CONFIG": json.dumps(
            {
                "cluster": {"worker": list(addresses)},
                "task": {"type": "worker", "index": index},
            }
        ),
    }
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags, f"--result_file={result_file}"],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Worker(index, process, log_file, result_file)


def _wait(workers: Sequence[_Worker], deadline: float, timeout_seconds: float) -> None:
    """Returns when all processes have ended well, raises as soon as one has not."""
    while True:
        exited = [worker.poll() for worker in workers]
        failed = [worker for worker in workers if worker.process.returncode]
        if failed:
            _raise_failure(failed[0], workers, deadline)
        if all(exited):
            return
        if time.monotonic() > deadline:
            running = [worker for worker in workers if not worker.poll()]
            raise ClusterFailedError(
                f"Expected {len(workers)} workers to end within {timeout_seconds:g} s, but workers "
                f"{[worker.index for worker in running]} are still running; raise "
                f"--timeout_seconds if the machine is slow. Log of worker {running[0].index}:\n"
                f"{running[0].log_tail()}"
            )
        time.sleep(_POLL_SECONDS)


def _raise_failure(first: _Worker, workers: Sequence[_Worker], deadline: float) -> None:
    """Raises an error with the log of the process that failed first."""
    grace = min(deadline, time.monotonic() + _FAILURE_GRACE_SECONDS)
    while not all([worker.poll() for worker in workers]) and time.monotonic() < grace:
        time.sleep(_POLL_SECONDS)
    codes = {worker.index: worker.process.returncode for worker in workers}
    raise ClusterFailedError(
        f"Expected {len(workers)} workers to exit with code 0, but worker {first.index} failed "
        f"first (exit codes by worker: {codes}, None is still running); its log says why:\n"
        f"{first.log_tail()}"
    )


def _outcome(worker: _Worker) -> WorkerOutcome:
    """Reads the result of a process that has ended well."""
    assert worker.exited_at is not None
    try:
        result = json.loads(worker.result_file.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ClusterFailedError(
            f"Expected a JSON object in the result file of worker {worker.index}, got {error!r}; "
            f"its log says what it did instead:\n{worker.log_tail()}"
        ) from error
    return WorkerOutcome(result, worker.exited_at)
