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
from collections.abc import Mapping, Sequence
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.02
# Enough for the others to report their own view of a failure before they are killed.
_FAILURE_GRACE_SECONDS = 3.0
# A worker gives up before it is killed, so that a hung one can print its stacks.
_WORKER_TIMEOUT_SHARE = 0.9
_LOG_TAIL_LINES = 40
_MEMORY_POLL_SECONDS = 0.2


class ClusterFailedError(RuntimeError):
    """A process failed or the cluster did not end in time; the text has the log."""


@dataclasses.dataclass(frozen=True)
class WorkerOutcome:
    """What one worker process left: the object in its result file and its exit time."""

    result: dict[str, Any]
    exited_at: float


@dataclasses.dataclass(frozen=True)
class MemoryReading:
    """What a process occupied at `time`, a time.time(), and at most until then."""

    time: float
    megabytes: float
    peak_megabytes: float


@dataclasses.dataclass
class Service:
    """A process that serves the workers as a `ps` task; it may end by itself, or is killed.

    Attributes:
        module: Started with `python -m`.
        flags: Its flags. In them "{port}" stands for the port of its address in TF_CONFIG, and
            "{give_up_at}" for the time.time() at which it has to exit by itself.
        memory: Readings of its memory, filled while it runs.
    """

    module: str
    flags: Sequence[str] = ()
    memory: list[MemoryReading] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Task:
    """One started process, a worker or a service, and its files."""

    task: str
    index: int
    process: subprocess.Popen[bytes]
    log_file: pathlib.Path
    result_file: pathlib.Path
    exited_at: float | None = None

    def __str__(self) -> str:
        return f"{self.task} {self.index}"

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
    module: str,
    worker_flags: Sequence[Sequence[str]],
    timeout_seconds: float,
    services: Sequence[Service] = (),
) -> list[WorkerOutcome]:
    """Runs `python -m module` once per entry of worker_flags, as the workers of one cluster.

    Each process finds its place in TF_CONFIG and additionally gets --result_file, where it has
    to write a JSON object, and --give_up_at, the time.time() at which it has to exit by itself.
    Services find their place in TF_CONFIG too, and get no flags but their own.

    Raises:
      ClusterFailedError: a process failed, wrote no result or did not end in time.
    """
    deadline = time.monotonic() + timeout_seconds
    give_up_at = time.time() + timeout_seconds * _WORKER_TIMEOUT_SHARE
    addresses = free_addresses(len(worker_flags) + len(services))
    cluster = {"worker": addresses[: len(worker_flags)]}
    if services:
        cluster["ps"] = addresses[len(worker_flags) :]
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        directory = pathlib.Path(name)
        workers: list[Task] = []
        servers: list[Task] = []
        try:
            for index, service in enumerate(services):
                port = cluster["ps"][index].rpartition(":")[2]
                flags = [flag.format(port=port, give_up_at=give_up_at) for flag in service.flags]
                servers.append(start(service.module, "ps", index, cluster, flags, directory))
            for index, flags in enumerate(worker_flags):
                flags = [*flags, f"--give_up_at={give_up_at}"]
                flags.append(f"--result_file={_result_file(directory, index)}")
                workers.append(start(module, "worker", index, cluster, flags, directory))
            _wait(workers, servers, services, deadline, timeout_seconds)
            return [_outcome(worker) for worker in workers]
        finally:
            for worker in (*workers, *servers):
                worker.kill()


def _result_file(directory: pathlib.Path, index: int) -> pathlib.Path:
    """Returns where worker `index` writes its result."""
    return directory / f"worker_{index}.json"


def free_addresses(count: int) -> list[str]:
    """Returns addresses on this machine whose ports were free a moment ago."""
    with contextlib.ExitStack() as stack:
        # All are open at the same time, otherwise the same port could be returned twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]


def start(
    module: str,
    task: str,
    index: int,
    cluster: Mapping[str, Sequence[str]],
    flags: Sequence[str],
    directory: pathlib.Path,
    prefix: Sequence[str] = (),
) -> Task:
    """Starts task `index` with its output going to a file; `prefix` is put before its command."""
    log_file = directory / f"{task}_{index}.log"
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": task, "index": index}}),
    }
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *flags],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Task(task, index, process, log_file, _result_file(directory, index))


def _wait(
    workers: Sequence[Task],
    servers: Sequence[Task],
    services: Sequence[Service],
    deadline: float,
    timeout_seconds: float,
) -> None:
    """Returns when all workers have ended well, raises as soon as a process has not."""
    everybody = [*workers, *servers]
    read_memory_at = time.monotonic()
    while True:
        exited = [worker.poll() for worker in workers]
        if time.monotonic() >= read_memory_at:
            for server, service in zip(servers, services, strict=True):
                service.memory += _read_memory(server.process.pid)
            read_memory_at = time.monotonic() + _MEMORY_POLL_SECONDS
        failed = [worker for worker in everybody if worker.process.poll()]
        if failed:
            _raise_failure(failed[0], everybody, deadline)
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


def _read_memory(pid: int) -> list[MemoryReading]:
    """Returns one reading of a process's memory, none if it is ending."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
        now, peak = (int(kilobytes[name]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
        return [MemoryReading(time.time(), now, peak)]
    return []


def _raise_failure(first: Task, everybody: Sequence[Task], deadline: float) -> None:
    """Raises an error with the log of the process that failed first."""
    grace = min(deadline, time.monotonic() + _FAILURE_GRACE_SECONDS)
    while not all([worker.poll() for worker in everybody]) and time.monotonic() < grace:
        time.sleep(_POLL_SECONDS)
    codes = {str(worker): worker.process.returncode for worker in everybody}
    raise ClusterFailedError(
        f"Expected all processes to exit with code 0, but {first} failed first (exit codes: "
        f"{codes}, None is still running); its log says why:\n{first.log_tail()}"
    )


def _outcome(worker: Task) -> WorkerOutcome:
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
