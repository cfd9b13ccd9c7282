"""Faults as data: what happens to which process of a job, and in which round.

    Faults().kill(worker=1, at_round=7).restart(after_seconds=0.5).stop(worker=2, at_round=9)

`Faults` are given to a `FaultyJob` (see `jobs.py`), which asks them what is due. `Chaos` draws
faults at random, and never more than the job can bear.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

KILL, KILL_CHILD, STOP, CUT, RESET = "kill", "kill_child", "stop", "cut", "reset"


class Fault(NamedTuple):
    """One thing that happens to one task.

    Args:
        action: `KILL` (SIGKILL), `KILL_CHILD` (of the processes that it has started), `STOP`
            (SIGSTOP, later SIGCONT), `CUT` (its network forwards nothing for a while) or `RESET`
            (its connections break).
        task: "worker 1" or "ps 0".
        at_round: Happens as soon as the task has done so many rounds; a `ps` task has done as many
            as the worker that is furthest.
        seconds: How long a task is stopped or cut off.
        restart_seconds: How long after being killed it is started again; `None` for never.
        spare: How many other workers must be sound; until they are, nothing happens.
    """

    action: str
    task: str
    at_round: int
    seconds: float = 0.0
    restart_seconds: float | None = None
    spare: int = 0


class View(NamedTuple):
    """What is known of a job when faults are chosen.

    Args:
        now: Seconds since the first worker has joined.
        rounds: How many rounds each running task has done; a task that has not joined yet is not
            in it.
        sound: The workers that run undisturbed and are not behind.
        services: The `ps` tasks that run undisturbed.
    """

    now: float
    rounds: dict[str, int]
    sound: frozenset[str]
    services: frozenset[str]


class Plan(Protocol):
    """What a job is asked about its faults."""

    def due(self, view: View) -> list[Fault]:
        """Returns the faults that are to happen now; each is returned once."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether nothing more is going to happen."""
        ...


class Faults:
    """Faults at certain rounds; every method but `sparing` adds one. All return the object."""

    def __init__(self) -> None:
        self.planned: list[Fault] = []
        self._left: list[Fault] | None = None

    def kill(self, *, at_round: int, worker: int | None = None, ps: int | None = None) -> "Faults":
        """Kills a task, for good unless `restart` follows."""
        return self._add(Fault(KILL, _task(worker, ps), at_round))

    def kill_child(self, *, worker: int, at_round: int) -> "Faults":
        """Kills what a worker has started, such as the service."""
        return self._add(Fault(KILL_CHILD, _task(worker, None), at_round))

    def restart(self, *, after_seconds: float = 0.3) -> "Faults":
        """Starts the task that was killed last again."""
        assert self.planned and self.planned[-1].action == KILL, "a restart follows a kill"
        self.planned[-1] = self.planned[-1]._replace(restart_seconds=after_seconds)
        return self

    def sparing(self, workers: int) -> "Faults":
        """Lets the last fault wait until so many other workers are sound."""
        self.planned[-1] = self.planned[-1]._replace(spare=workers)
        return self

    def stop(
        self, *, at_round: int, seconds: float, worker: int | None = None, ps: int | None = None
    ) -> "Faults":
        """Stops a task as a debugger does, and lets it go on after some time."""
        return self._add(Fault(STOP, _task(worker, ps), at_round, seconds))

    def cut(self, *, worker: int, at_round: int, seconds: float) -> "Faults":
        """Cuts a worker off from the service for some time."""
        return self._add(Fault(CUT, _task(worker, None), at_round, seconds))

    def reset(self, *, worker: int, at_round: int) -> "Faults":
        """Breaks a worker's connections to the service."""
        return self._add(Fault(RESET, _task(worker, None), at_round))

    def _add(self, fault: Fault) -> "Faults":
        self.planned.append(fault)
        return self

    # What a job asks.

    @property
    def is_over(self) -> bool:
        """Whether everything has happened."""
        return self._left is not None and not self._left

    def due(self, view: View) -> list[Fault]:
        """Returns the faults that are to happen now; each is returned once."""
        if self._left is None:
            self._left = list(self.planned)
        front = max(view.rounds.values(), default=-1)
        due: list[Fault] = []
        for fault in self._left:
            # A second fault of a task waits until the first one has been seen to, and a worker to
            # which something happens now does not count as one that is left.
            struck = {d.task for d in due}
            done = front if fault.task in view.services else view.rounds.get(fault.task, -1)
            spared = len(view.sound - struck - {fault.task}) >= fault.spare
            if done >= fault.at_round and spared and fault.task not in struck:
                due.append(fault)
        self._left = [f for f in self._left if f not in due]
        return due


@dataclasses.dataclass
class Chaos:
    """A fault every few seconds, drawn at random.

    Never one that would leave fewer than `spare` sound workers, so that there is always one that
    can give its state, and another if that one is next.

    Args:
        seed: Of the draw.
        seconds: How long it lasts.
        every_seconds: Mean time between faults.
        actions: What may happen to workers.
        kills_services: Whether a `ps` task may be killed; it is started again.
        spare: How many sound workers are left at least.
    """

    seed: int
    seconds: float
    every_seconds: float = 2.0
    actions: tuple[str, ...] = (KILL, STOP, CUT, RESET)
    kills_services: bool = False
    spare: int = 2

    def __post_init__(self) -> None:
        self.happened: list[Fault] = []
        self._random = random.Random(self.seed)
        self._next = 0.0
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether its time has passed."""
        return self._is_over

    def due(self, view: View) -> list[Fault]:
        """Returns the faults that are to happen now."""
        self._is_over = view.now > self.seconds
        if self._is_over or view.now < self._next:
            return []
        tasks = sorted(view.sound) if len(view.sound) > self.spare else []
        if self.kills_services and len(view.sound) >= self.spare:
            tasks += sorted(view.services)
        if not tasks:
            return []
        self._next = view.now + self._random.uniform(0.5, 1.5) * self.every_seconds
        task = self._random.choice(tasks)
        action = KILL if task in view.services else self._random.choice(self.actions)
        fault = Fault(
            action,
            task,
            max(view.rounds.values(), default=0),
            self._random.uniform(0.5, 5.0) if action in (STOP, CUT) else 0.0,
            self._random.uniform(0.1, 1.0) if action == KILL else None,
        )
        self.happened.append(fault)
        return [fault]


class Agenda:
    """What is to be done later, such as starting again what was killed."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, Callable[[], None]]] = []

    def add(self, at: float, act: Callable[[], None]) -> None:
        """Notes what is to be done, and when."""
        self._entries.append((at, act))

    def due(self, now: float) -> list[Callable[[], None]]:
        """Returns what is to be done now; each is returned once.

        The clock is read once, by the caller: what became due between two readings would be
        neither returned nor kept.
        """
        due = [act for at, act in self._entries if at <= now]
        self._entries = [(at, act) for at, act in self._entries if at > now]
        return due


def _task(worker: int | None, ps: int | None) -> str:
    assert (worker is None) != (ps is None), "a fault happens to a worker or to a ps task"
    return f"ps {ps}" if worker is None else f"worker {worker}"
