"""A job without machines: run-times go in, the rounds that a service would have come out."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from tf_syncdist.aggregation.records import Closed, Fate, SliceKey, SliceSpec
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.cutoff import CutoffPolicy, Plan, Planner, RoundTimes
from tf_syncdist.cutoff.planning import TrainingRequest

if TYPE_CHECKING:
    from tf_syncdist.cutoff.models import RunTimeModel

# All values of a worker arrive at once.
_SPEC = SliceSpec(num_slices=1, dtype="float32", elements=1, layout=0)


@runtime_checkable
class Foresight(Protocol):
    """A policy that is told the future; only a simulator can."""

    def foresee(self, seconds: np.ndarray) -> Plan:
        """Returns the plan for a round, given when everybody will be in.

        Args:
            seconds: float64, [num_workers]. Seconds from the round's opening until each worker is
                in, if the round lasts that long.
        """
        ...


# Makes a run-time model of what a planner has recorded, or says why it cannot.
Trainer = Callable[[TrainingRequest], "RunTimeModel | str"]


class Outcome(NamedTuple):
    """What a simulated job did.

    Args:
        contributions: int64, [rounds]. How many workers each update was made of.
        round_seconds: float64, [rounds]. How long each round lasted.
        contributed: int64, [num_workers]. For how many rounds each worker's values were used.
        dropped: int64, [num_workers]. For how many it computed and was late.
        skipped: int64, [num_workers]. For how many it did not compute, busy with an older one.
        reason: What the policy said when the last round was closed.
    """

    contributions: np.ndarray
    round_seconds: np.ndarray
    contributed: np.ndarray
    dropped: np.ndarray
    skipped: np.ndarray
    reason: str

    @property
    def throughput(self) -> float:
        """Contributions per second."""
        return float(self.contributions.sum() / self.round_seconds.sum())


def simulate(
    seconds: np.ndarray,
    policy: CutoffPolicy,
    late_workers_stay_busy: bool = False,
    first_round: int = 0,
    train: Trainer | None = None,
) -> Outcome:
    """Runs a job whose workers take known times.

    Args:
        seconds: float64, [rounds, num_workers]. How long each worker needs for each round.
        policy: The cutoff policy.
        late_workers_stay_busy: Whether a late worker computes on to the end, as a real one does,
            and takes part again in the round that is open then. By default it begins the next
            round together with the others, which is what most of the literature computes.
        first_round: The outcome is that of the rounds from this one on. The ones before it only
            teach the policy.
        train: Trains the run-time models that the policy asks for, between two rounds. Without it
            none is trained.

    Returns:
        An `Outcome`.

    Raises:
        ValueError: If `seconds` are no such times, or the policy does not fit the workers.
        RuntimeError: If the policy fails. A real job would go on with full sync.

    Example:

    >>> import numpy as np
    >>> from tf_syncdist.cutoff import BackupWorkers
    >>> outcome = simulate(np.array([[1.0, 2.0, 9.0]] * 10), BackupWorkers(1))
    >>> outcome.throughput, outcome.dropped.tolist()
    (1.0, [0, 0, 10])
    >>> outcome = simulate(np.array([[1.0, 2.0, 9.0]] * 10), BackupWorkers(1), True)
    >>> outcome.dropped.tolist(), outcome.skipped.tolist()
    ([0, 0, 2], [0, 0, 6])
    """
    seconds = checked(seconds)
    if not 0 <= first_round < len(seconds):
        raise ValueError(
            f"Expected `first_round` to be one of the {len(seconds)} rounds. "
            f"Received: first_round={first_round}."
        )
    return _Job(seconds, policy, late_workers_stay_busy, train).run(first_round)


def checked(seconds: np.ndarray) -> np.ndarray:
    """Returns run-times as float64.

    Raises:
        ValueError: If they are not positive and finite, or there are none.
    """
    seconds = np.asarray(seconds, np.float64)
    if seconds.ndim != 2 or 0 in seconds.shape:
        raise ValueError(
            "Expected `seconds` to be of shape [rounds, workers] with one of each at least. "
            f"Received: shape {list(seconds.shape)}."
        )
    wrong = ~(np.isfinite(seconds) & (seconds > 0))
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        raise ValueError(
            "Expected `seconds` to be positive and finite. "
            f"Received: {seconds[place]} in round {place[0]}, worker {place[1]}."
        )
    return seconds


class _Job:
    """The workers of a job, one round after the other.

    A worker is *busy* while it computes for a round that is over.
    """

    def __init__(
        self, seconds: np.ndarray, policy: CutoffPolicy, stay_busy: bool, train: Trainer | None
    ) -> None:
        self._seconds = seconds
        self._stay_busy = stay_busy
        num_rounds, num_workers = seconds.shape
        self._rounds = Rounds(num_workers, policy)
        self._planner: Planner | None = policy.planner(num_workers)
        self._train = train if hasattr(self._planner, "training_request") else None
        self._foresight = policy if isinstance(policy, Foresight) else None
        self._now = 0.0
        self._closed_at = 0.0
        # For busy workers: until when, and with which run.
        self._busy_until = np.zeros(num_workers)
        self._busy_with = np.full(num_workers, -1)
        self._contributions = np.zeros(num_rounds, np.int64)
        self._lengths = np.zeros(num_rounds)
        self._reason = ""

    def run(self, first_round: int) -> Outcome:
        """Runs all rounds and returns what came of those from one on."""
        self._set_plan(0)
        for run in range(len(self._seconds)):
            if run == first_round:
                before = self._fates()
            self._round(run)
        contributed, late, replayed, _ = self._fates() - before
        measured = slice(first_round, None)
        return Outcome(
            self._contributions[measured],
            self._lengths[measured],
            contributed,
            late,
            replayed,
            self._reason,
        )

    def _fates(self) -> np.ndarray:
        """Returns how often each `Fate`, in their order, has been that of each worker."""
        return np.array([[c.fates[fate] for c in self._rounds.counts] for fate in Fate])

    def _round(self, run: int) -> None:
        busy = np.flatnonzero(self._busy_with >= 0)
        begins = np.full(len(self._busy_with), self._now)
        begins[busy] = np.maximum(self._busy_until[busy], self._now)
        arrivals = begins + self._seconds[run]
        if self._foresight:
            plan = self._foresight.foresee(arrivals - self._now)
            self._rounds.set_plan(run, plan, self._now)
        closed = self._until_closed(run, arrivals, busy)
        self._contributions[run] = len(closed.contributors)
        self._lengths[run] = self._closed_at - self._now
        self._reason = closed.reason
        self._now = self._closed_at
        self._finish(run, closed.contributors, arrivals)

    def _until_closed(self, run: int, arrivals: np.ndarray, busy: np.ndarray) -> Closed:
        """Lets workers arrive until the round is closed."""
        rounds = self._rounds
        contribute = rounds.contribute
        key = SliceKey(run, 0, 0)
        workers, elapsed, times = self._events(run, arrivals, busy)
        asked = -math.inf
        for worker, took, at in zip(workers, elapsed, times, strict=True):
            wake_at = rounds.wake_at
            while wake_at is not None and asked < wake_at <= at:
                asked = wake_at
                if closed := rounds.tick(wake_at):
                    return self._take(closed, wake_at)
                wake_at = rounds.wake_at
            if worker < 0:
                self._return_late(~worker)
                continue
            closed = contribute(worker, key, _SPEC, at, took).closed
            if closed:
                return self._take(closed, at)
        raise RuntimeError(
            f"Expected round {run} to be closed when all {rounds.num_workers} workers are in. "
            f"Received: nothing of the kind from {rounds.cutoff.policy!r}."
        )

    def _take(self, closed: tuple[Closed, ...], at: float) -> Closed:
        if self._rounds.cutoff.failure:
            raise RuntimeError(self._rounds.cutoff.failure)
        self._closed_at = at
        return closed[0]

    def _events(
        self, run: int, arrivals: np.ndarray, busy: np.ndarray
    ) -> tuple[list[int], list[float], list[float]]:
        """Returns who arrives, having computed for how long, and when; ~w where w is late."""
        order = np.argsort(arrivals, kind="stable")
        workers, elapsed, times = order, self._seconds[run][order], arrivals[order]
        if len(busy):
            free = np.maximum(self._busy_until[busy], self._now)
            workers = np.concatenate((~busy, workers))
            elapsed = np.concatenate((np.zeros(len(busy)), elapsed))
            times = np.concatenate((free, times))
            order = np.argsort(times, kind="stable")
            workers, elapsed, times = workers[order], elapsed[order], times[order]
        return workers.tolist(), elapsed.tolist(), times.tolist()

    def _return_late(self, worker: int) -> None:
        """Lets a busy worker come back: its values are late, and it catches up."""
        rounds = self._rounds
        run, at = int(self._busy_with[worker]), float(self._busy_until[worker])
        self._busy_with[worker] = -1
        took = float(self._seconds[run, worker])
        rounds.contribute(worker, SliceKey(run, 0, 0), _SPEC, at, took)
        rounds.finish(worker, run, 1, Fate.LATE)
        for missed in range(run + 1, rounds.runs_over):
            rounds.finish(worker, missed, 1, Fate.REPLAYED)

    def _finish(self, run: int, contributors: tuple[int, ...], arrivals: np.ndarray) -> None:
        """Lets everybody who is not busy go on to the next round."""
        finish = self._rounds.finish
        for worker in contributors:
            for times in finish(worker, run, 1, Fate.CONTRIBUTED).times:
                self._observe(times)
        late = self._busy_with < 0
        late[list(contributors)] = False
        if self._stay_busy:
            self._busy_with[late] = run
            self._busy_until[late] = arrivals[late]
        else:
            for worker in np.flatnonzero(late).tolist():
                finish(worker, run, 1, Fate.LATE)
        self._set_plan(run + 1)

    def _observe(self, times: RoundTimes) -> None:
        planner = self._planner
        if planner is None:
            return
        planner.observe(times)
        request = planner.training_request() if self._train else None
        if request:
            model = self._train(request)
            (planner.training_failed if isinstance(model, str) else planner.accept)(model)

    def _set_plan(self, run: int) -> None:
        if self._planner and run < len(self._seconds):
            self._rounds.set_plan(run, self._planner.plan(), self._now)
