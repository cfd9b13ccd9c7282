"""Runs a job of real processes while faults happen to it, and tells what each life left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tf_syncdist.cluster.ports import reserve_ports

from ..multi_worker.forkserver import ForkedProcess
from ..multi_worker.harness import environment, fork_server
from .injector import CUT, KILL, KILL_CHILD, RESET, STOP, Agenda, Fault, Plan, View
from .network import Machine
from .proxy import Proxy

_PROGRAMS = Path(__file__).parent / "programs"
_TAIL_LINES = 40
_POLL_SECONDS = 0.01
# A worker that is no further than this behind the front is called sound.
_BEHIND_ROUNDS = 3
_SERVICE_END_SECONDS = 40.0
# At least one and at most two lines of a trace.
_LINE_BYTES = 140
_LIFE = "TF_SYNCDIST_TEST_LIFE"
# Name of the file that is made when no more faults are to come; see `programs/member.py`.
_CALM = "calm"
# And of that which is made before, when all have happened; the last rounds are slow before it.
_OVER = "over"


class Life:
    """One life of a task, from its start to its end.

    Attributes:
        task: "worker 1" or "ps 0".
        number: How often the task had been started before.
        killed: Whether the injector has killed it.
        started_at: When it was started, in seconds after the job's start.
        ended_at: When it was seen to have ended, `None` while it runs.
    """

    def __init__(self, directory: Path, task: str, number: int, started_at: float) -> None:
        self.task = task
        self.number = number
        self.killed = False
        self.started_at = started_at
        self.ended_at: float | None = None
        self.process: subprocess.Popen | ForkedProcess | None = None
        self.path = directory / f"{task.replace(' ', '-')}.life-{number}"
        self.log = self.path.with_suffix(self.path.suffix + ".log")
        self._result = self.path.with_suffix(self.path.suffix + ".json")
        self._trace = self.path.with_suffix(self.path.suffix + ".trace")

    @property
    def is_worker(self) -> bool:
        """Whether it is a worker's."""
        return self.task.startswith("worker")

    @property
    def status(self) -> int | None:
        """The exit status, `None` while it runs."""
        return self.process.poll()

    @property
    def result(self) -> dict[str, Any] | None:
        """What a worker has written at its end."""
        return json.loads(self._result.read_text()) if self._result.exists() else None

    @property
    def rounds(self) -> int:
        """How many rounds a worker has done, -1 before it has joined."""
        with contextlib.suppress(FileNotFoundError), self._trace.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LINE_BYTES))
            *lines, _ = file.read().split(b"\n")
            return int(lines[-1].split()[0]) if lines else -1
        return -1

    @property
    def trace(self) -> list[tuple[int, str]]:
        """After each run, how many rounds there were, and a fingerprint of the variables."""
        if not self._trace.exists():
            return []
        *lines, _ = self._trace.read_text().split("\n")
        return [
            (int(rounds), sha256) for rounds, sha256 in (line.split(maxsplit=1) for line in lines)
        ]


class FaultyJob:
    """The processes of a job, and what happens to them.

    Args:
        program: Name of a file in `programs/`.
        directory: Where results and logs are written.
        workers: How many workers the cluster has.
        plan: What happens; `Faults()` for an undisturbed job.
        ps: How many `ps` tasks it has; with 0 the service lives with worker 0.
        arguments: Given to the program as JSON.
        seconds: How long the job may take.
        statuses: Expected exit statuses of workers that do not end with 0.
        machine: A namespace for worker 1, whose cable is pulled where that worker is cut off. By
            default each worker that is cut off or whose connections are reset has a proxy.
        proxied: Whether there are proxies.
    """

    def __init__(
        self,
        program: str,
        directory: Path,
        *,
        workers: int,
        plan: Plan,
        ps: int = 1,
        arguments: Mapping[str, Any] | None = None,
        seconds: float = 220.0,
        statuses: Mapping[str, int] | None = None,
        machine: Machine | None = None,
        proxied: bool = True,
    ) -> None:
        self.lives: dict[str, list[Life]] = {}
        self.applied: list[tuple[float, Fault]] = []
        self._program = str(_PROGRAMS / program)
        self._directory = directory
        self._plan = plan
        self._arguments = dict(arguments or {})
        self._seconds = seconds
        self._statuses = dict(statuses or {})
        self._machine = machine
        self._stack = contextlib.ExitStack()
        self._proxies: dict[str, list[Proxy]] = {}
        self._disturbed: set[str] = set()
        self._later = Agenda()
        self._is_calm = False
        self._started_at = time.monotonic()
        self._joined_at: float | None = None
        try:
            self._prepare(workers, ps, proxied)
        except BaseException:
            self._stack.close()
            raise

    def _prepare(self, workers: int, ps: int, proxied: bool) -> None:
        ports = self._stack.enter_context(reserve_ports(workers + ps))
        host = self._machine.address if self._machine is not None else "127.0.0.1"
        self._workers = [f"127.0.0.1:{p.port}" for p in ports[:workers]]
        self._services = [f"{host}:{p.port}" for p in ports[workers:]]
        for index in range(workers if proxied and ps and self._machine is None else 0):
            proxies = [self._stack.enter_context(Proxy(s)) for s in self._services]
            self._proxies[f"worker {index}"] = proxies
        for port in ports:
            port.release()

    def __enter__(self) -> "FaultyJob":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything that was started. May be called twice."""
        lives = [life for lives in self.lives.values() for life in lives]
        for life in lives:
            if life.process is not None and life.status is None:
                _signal_group(life, signal.SIGKILL)
                life.process.kill()
        for life in lives:
            if life.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    life.process.wait(10)
        self._stack.close()

    def run(self) -> "FaultyJob":
        """Starts the job and returns when all workers that are not killed for good have ended.

        Raises:
            AssertionError: If a process ends otherwise than expected, or the job not in time. The
                message has the ends of all logs.
        """
        for index in range(len(self._services)):
            self._start(f"ps {index}")
        for index in range(len(self._workers)):
            self._start(f"worker {index}")
        while not self._is_done():
            if self._now() > self._seconds:
                self._fail(f"the job has not ended within {self._seconds:g} s")
            self._watch()
            self._let_happen()
            time.sleep(_POLL_SECONDS)
        if not self._plan.is_over:
            self._fail("the job was over before all faults had happened; let it have more rounds")
        self._end_services()
        return self

    # What a job has left behind.

    @property
    def last_lives(self) -> list[Life]:
        """The last lives of the workers that have ended by themselves."""
        last = [lives[-1] for task, lives in self.lives.items() if task.startswith("worker")]
        return [life for life in last if not life.killed]

    @property
    def text(self) -> str:
        """What all processes have printed."""
        return "\n".join(life.log.read_text(errors="replace") for life in self._all_lives())

    def results(self) -> dict[int, dict[str, Any]]:
        """Returns what the workers that have ended well have written."""
        found = {int(x.task.split()[1]): x.result for x in self.last_lives if not x.status}
        for worker, result in found.items():
            assert result is not None, f"worker {worker} has written no result{self._tails()}"
        return found

    def check_alike(self, rounds: int) -> None:
        """Checks that all workers that have ended hold the same, and always did.

        Args:
            rounds: How many rounds the job has.
        """
        results = self.results()
        assert results, "no worker has ended well"
        assert {r["rounds"] for r in results.values()} == {rounds}, (results, self._tails())
        for name in ("weights_sha256", "optimizer_sha256"):
            assert len({r[name] for r in results.values()}) == 1, (name, results, self._tails())
        assert "differs from" not in self.text, f"a worker had come to differ{self._tails()}"
        self.check_no_round_was_made_twice()

    def check_no_round_was_made_twice(self) -> None:
        """Checks that after a round every worker, in every life, had the same variables."""
        seen: dict[int, tuple[str, str]] = {}
        for life in self._all_lives():
            before = -1
            for rounds, sha256 in life.trace:
                who = f"{life.task} in life {life.number}"
                assert rounds >= before, f"{who} went back from round {before} to {rounds}"
                before = rounds
                if rounds == 0:
                    # Before the first round each worker has what it was built with.
                    continue
                first, expected = seen.setdefault(rounds, (who, sha256))
                assert sha256 == expected, (
                    f"after round {rounds} {who} differs from {first}{self._tails()}"
                )

    # How.

    def _now(self) -> float:
        return time.monotonic() - self._started_at

    def _all_lives(self) -> list[Life]:
        return [life for lives in self.lives.values() for life in lives]

    def _start(self, task: str) -> None:
        kind, index = task.split()
        lives = self.lives.setdefault(task, [])
        life = Life(self._directory, task, len(lives), self._now())
        lives.append(life)
        life.log.touch()
        if kind == "ps":
            host, _, port = self._services[int(index)].rpartition(":")
            flags = [f"--host={host}", f"--port={port}"]
            flags += ["--insecure"] if self._machine is not None else []
            command = [sys.executable, "-m", "tf_syncdist.aggregator", *flags]
            life.process = self._popen(command, {_LIFE: str(life.path)}, life)
            return
        proxies = self._proxies.get(task)
        services = [p.address for p in proxies] if proxies else self._services
        cluster = {"worker": self._workers} | ({"ps": services} if services else {})
        config = {"cluster": cluster, "task": {"type": "worker", "index": int(index)}}
        own = {"TF_CONFIG": json.dumps(config), _LIFE: str(life.path)}
        command = [self._program, json.dumps(self._arguments)]
        if self._machine is not None and task == "worker 1":
            prefixed = [*self._machine.prefix, sys.executable, *command]
            life.process = self._popen(prefixed, own, life)
        else:
            life.process = fork_server().start(command, own, self._directory, life.log)

    def _popen(
        self, command: Sequence[str], own: Mapping[str, str], life: Life
    ) -> subprocess.Popen:
        with life.log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self._directory,
                env=environment() | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _is_done(self) -> bool:
        workers = [lives[-1] for task, lives in self.lives.items() if lives[-1].is_worker]
        return not self._restarts_are_due() and all(w.ended_at is not None for w in workers)

    def _restarts_are_due(self) -> bool:
        return any(task.startswith("worker") for task in self._disturbed)

    def _watch(self) -> None:
        for task, lives in self.lives.items():
            life = lives[-1]
            if life.ended_at is not None or life.status is None:
                continue
            life.ended_at = self._now()
            expected = -signal.SIGKILL if life.killed else self._statuses.get(task, 0)
            if life.status != expected:
                self._fail(f"{task} has ended with status {life.status} in life {life.number}")

    def _let_happen(self) -> None:
        for act in self._later.due(self._now()):
            act()
        view = self._view()
        if self._joined_at is not None:
            for fault in self._plan.due(view):
                self._apply(fault)
            self._say_when_it_is_calm()

    def _say_when_it_is_calm(self) -> None:
        """Tells the workers when all faults are over and seen to: rounds need no time from then on.

        However busy the machine is, a job is not over before.
        """
        if self._is_calm or not self._plan.is_over or self._disturbed:
            return
        (self._directory / _OVER).touch()
        view = self._view()
        running = {t for t, x in self.lives.items() if x[-1].is_worker and x[-1].ended_at is None}
        if running == view.sound:
            self._is_calm = True
            (self._directory / _CALM).touch()

    def _view(self) -> View:
        running = {t: x[-1] for t, x in self.lives.items() if x[-1].ended_at is None}
        rounds = {t: x.rounds for t, x in running.items() if x.is_worker}
        rounds = {t: done for t, done in rounds.items() if done >= 0}
        if self._joined_at is None and len(rounds) == len(self._workers):
            self._joined_at = self._now()
        front = max(rounds.values(), default=0)
        sound = {t for t, done in rounds.items() if done >= max(front - _BEHIND_ROUNDS, 1)}
        return View(
            self._now() - (self._joined_at or 0.0),
            rounds,
            frozenset(sound - self._disturbed),
            frozenset(t for t in running if t.startswith("ps") and t not in self._disturbed),
        )

    def _apply(self, fault: Fault) -> None:
        self.applied.append((self._now(), fault))
        life = self.lives[fault.task][-1]
        if life.status is not None:
            self._fail(f"{fault.task} had ended before {fault}")
        if fault.action == KILL:
            life.killed = True
            _signal_group(life, signal.SIGKILL)
            if fault.restart_seconds is not None:
                self._undo(fault, fault.restart_seconds, lambda: self._restart(fault.task))
        elif fault.action == KILL_CHILD:
            # It may be about to start again what was killed last.
            deadline = time.monotonic() + _SERVICE_END_SECONDS
            while not (children := _children(life)):
                if time.monotonic() > deadline:
                    self._fail(f"{fault.task} has no child to kill")
                time.sleep(_POLL_SECONDS)
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        elif fault.action == STOP:
            _signal_group(life, signal.SIGSTOP)
            name = fault.task.replace(" ", "-")
            (self._directory / f"{name}.stopped").touch()

            def go_on() -> None:
                _signal_group(life, signal.SIGCONT)
                (self._directory / f"{name}.goes-on").touch()

            self._undo(fault, fault.seconds, go_on)
        elif fault.action == CUT:
            self._cut(fault.task, True)
            self._undo(fault, fault.seconds, lambda: self._cut(fault.task, False))
        elif fault.action == RESET:
            for proxy in self._proxies[fault.task]:
                proxy.reset()

    def _undo(self, fault: Fault, seconds: float, act: Callable[[], None]) -> None:
        self._disturbed.add(fault.task)

        def undo() -> None:
            self._disturbed.discard(fault.task)
            act()

        self._later.add(self._now() + seconds, undo)

    def _restart(self, task: str) -> None:
        life = self.lives[task][-1]
        life.process.wait(30)
        self._watch()
        self._start(task)

    def _cut(self, task: str, is_cut: bool) -> None:
        if self._machine is not None:
            assert task == "worker 1", "only worker 1 has a machine of its own"
            lines = [self._machine]
        else:
            lines = self._proxies[task]
        for line in lines:
            line.cut() if is_cut else line.heal()

    def _end_services(self) -> None:
        """Waits for the end of the services, which is that of the job."""
        deadline = time.monotonic() + _SERVICE_END_SECONDS
        services = [lives[-1] for task, lives in self.lives.items() if task.startswith("ps")]
        while not all(s.ended_at is not None for s in services):
            self._watch()
            if time.monotonic() > deadline:
                self._fail("a service has not ended with its job")
            time.sleep(_POLL_SECONDS)
        while left := self._children_left():
            if time.monotonic() > deadline:
                self._fail(f"processes were left behind: {left}")
            time.sleep(_POLL_SECONDS)

    def _children_left(self) -> dict[str, str]:
        """Returns what tasks of this job have started and is still there."""
        found = {}
        mark = f"{_LIFE}={self._directory}/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[entry.name] = command.decode(errors="replace")
        return found

    def _fail(self, why: str) -> None:
        running = [x for x in self._all_lives() if x.process is not None and x.status is None]
        for life in running:
            # Python's fault handler prints where it is.
            life.process.send_signal(signal.SIGCONT)
            life.process.send_signal(signal.SIGABRT)
        for life in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                life.process.wait(5)
        still = ", ".join(life.task for life in running) or "none"
        raise AssertionError(f"{why}; still running: {still}{self._tails()}")

    def _tails(self) -> str:
        happened = [f"{at:7.2f} s: {fault}" for at, fault in self.applied]
        parts = ["", "---- faults ----", *happened]
        for life in self._all_lives():
            lines = life.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            about = f"status {life.status}, {life.rounds} rounds, from {life.started_at:.2f} s"
            parts += [f"---- {life.task}, life {life.number} ({about}) ----", *lines]
        return "\n".join(parts)


def _children(life: Life) -> list[int]:
    tasks = Path(f"/proc/{life.process.pid}/task").glob("*/children")
    pids = [int(pid) for task in tasks for pid in task.read_text().split()]
    return [pid for pid in pids if not _is_dead(pid)]


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _signal_group(life: Life, number: int) -> None:
    # Every process of a job leads a session of its own, children and `ip netns exec` included.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(life.process.pid, number)
