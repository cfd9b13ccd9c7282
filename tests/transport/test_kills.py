"""Processes that are killed in the middle of an exchange: others go on, and nothing is left."""

import contextlib
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tf_syncdist

_ROOT = Path(tf_syncdist.__file__).parents[1]
_PROGRAM = Path(__file__).parent / "programs" / "rounds.py"
_SECONDS = 100.0
WORKERS = 3


class Process:
    """A process of a job, and what it prints."""

    def __init__(self, *args: str) -> None:
        self.lines: list[str] = []
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        self.pid = self._process.pid
        threading.Thread(target=self._read, daemon=True).start()

    def line(self, pattern: str) -> re.Match:
        """Waits for a line that is like a pattern; what comes before it is passed over."""
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                text = self._news.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                text = None
            assert text is not None, (pattern, self.lines[-30:])
            if found := re.search(pattern, text):
                return found

    def go_on(self, rounds: int) -> None:
        """Waits for some more rounds, all of which have the right sums."""
        for _ in range(rounds):
            self.line(r"^round (\d+)")

    def forget(self) -> None:
        """Passes over what has been printed so far."""
        while not self._news.empty():
            self._news.get()

    def kill(self) -> None:
        """Kills it."""
        self._process.kill()
        self._process.wait(_SECONDS)

    def end(self) -> None:
        """Asks it to end."""
        self._process.terminate()

    def wait(self) -> int:
        """Waits until it has ended by itself, and returns how."""
        return self._process.wait(_SECONDS)

    def _read(self) -> None:
        for text in self._process.stdout:
            self.lines.append(text)
            self._news.put(text)
        self._news.put(None)


@contextlib.contextmanager
def job(*how: str) -> Iterator[tuple[Process, list[Process]]]:
    """A service and workers that do rounds in shared memory."""
    with contextlib.ExitStack() as stack:
        service = Process("-m", "tf_syncdist.aggregator", "--port=0")
        stack.callback(service.kill)
        address = service.line(r"listening on (\S+)")[1]
        workers = []
        for index in range(WORKERS):
            mode = how[index] if how else ""
            args = (str(_PROGRAM), address, str(index), str(WORKERS), mode)
            workers.append(Process(*args))
            stack.callback(workers[-1].kill)
        yield service, workers


def held() -> list[str]:
    """Processes that have memory of ours; this one has none."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if "memfd:tf_syncdist" in (process / "maps").read_text():
                found.append(process.name)
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if "memfd:tf_syncdist" in os.readlink(fd):
                        found.append(process.name)
    return found


def of(processes: list[Process]) -> set[str]:
    """Their numbers."""
    return {str(p.pid) for p in processes}


def memory_of(process: Process) -> set[int]:
    """The shared memory that a process has open."""
    found = set()
    for fd in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:tf_syncdist" in os.readlink(fd):
                found.add(fd.stat().st_ino)
    return found


def until(there: Callable[[], object]) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + _SECONDS
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_nothing_is_left(processes: list[Process]) -> None:
    """Neither do these processes hold memory, nor does a file, and nobody else has theirs."""
    assert not of(processes) & set(held())
    assert not [name for name in os.listdir("/dev/shm") if "syncdist" in name]


@pytest.mark.parametrize("seed", range(4))
def test_a_worker_that_is_killed(seed: int) -> None:
    rng = random.Random(seed)
    with job() as (service, workers):
        for worker in workers:
            worker.go_on(4)
        assert of([service, *workers]) <= set(held())
        # About as long as a round takes, so this is anywhere in it.
        time.sleep(rng.uniform(0, 0.08))
        victim = workers[rng.randrange(WORKERS)]
        others = [w for w in workers if w is not victim]
        own = memory_of(victim) - memory_of(others[0])
        victim.kill()
        service.line("is gone")
        for worker in others:
            worker.forget()
            worker.go_on(8)
        # What others do not read is its own; they may have been later to open something.
        own -= memory_of(others[0]) | memory_of(others[1])
        assert own
        until(lambda: not own & memory_of(service))
        for worker in others:
            worker.kill()
        service.end()
        assert service.wait() == 0
    check_nothing_is_left([service, *workers])


@pytest.mark.parametrize("seed", range(2))
def test_a_service_that_is_killed(seed: int) -> None:
    with job() as (service, workers):
        for worker in workers:
            worker.go_on(4)
        time.sleep(random.Random(seed).uniform(0, 0.08))
        service.kill()
        for worker in workers:
            # Else it would say at some time that others are waited for in vain.
            error = worker.line(r"^error (\w+): (.*)")
            assert error[1] == "ServiceError" and "went away" in error[2]
            assert worker.wait() == 0
        check_nothing_is_left([service, *workers])


def test_a_worker_that_scribbles_harms_nobody() -> None:
    with job("spoiled", "spoiled", "scribble") as (service, workers):
        for worker in workers:
            worker.go_on(12)
        workers[2].kill()
        service.line("is gone")
        for worker in workers[:2]:
            worker.forget()
            worker.go_on(5)
    check_nothing_is_left([service, *workers])


def test_a_worker_that_dies_before_its_memory_is_used() -> None:
    with job("", "", "dies") as (service, workers):
        assert workers[2].wait() == -signal.SIGKILL
        service.line("is gone")
        for worker in workers[:2]:
            worker.forget()
            worker.go_on(5)
        assert memory_of(workers[0]) and memory_of(workers[1])
        # It has what it created, and what the others have offered to it.
        until(lambda: memory_of(service) <= memory_of(workers[0]) | memory_of(workers[1]))
    check_nothing_is_left([service, *workers])
