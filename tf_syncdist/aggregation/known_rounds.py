"""What is known of the rounds of a job. Pure."""

import math

from tf_syncdist.aggregation.agreement import SliceState
from tf_syncdist.aggregation.cutoffs import Alarms, Cutoff
from tf_syncdist.aggregation.history import History, Positions
from tf_syncdist.aggregation.presence import Presence
from tf_syncdist.aggregation.records import RunOver, SliceKey, SliceSpec, WorkerCounts
from tf_syncdist.aggregation.timing import RoundTimer
from tf_syncdist.cutoff import CutoffPolicy, Plan


class Run:
    """A run that is not forgotten, or is in progress.

    Args:
        timer: Takes note of when its values come, until the run is over.
        plan: The plan for its round, if there is one.

    Attributes:
        exchanges: The slices of each exchange.
        arrivals: When each worker was first heard of in it.
        began_at: When the first one was.
        bytes: Size of its results.
    """

    __slots__ = ("arrivals", "began_at", "bytes", "exchanges", "plan", "timer")

    def __init__(self, timer: RoundTimer, plan: Plan | None) -> None:
        self.began_at = 0.0
        self.exchanges: dict[int, dict[int, SliceState]] = {}
        self.arrivals: dict[int, float] = {}
        self.bytes = 0
        self.timer: RoundTimer | None = timer
        self.plan = plan

    @property
    def slices(self) -> int:
        """How many slices are known."""
        return sum(map(len, self.exchanges.values()))


class KnownRounds:
    """The state of the rounds, and what can be asked about it; see `Rounds`.

    Args:
        num_workers: How many workers the job has.
        policy: The cutoff policy.
        history_rounds: Results are kept for at least this many rounds that are over, as long as
            a worker that is still there has not done them.
        history_bytes: And for more, while they need at most this many bytes.
        min_workers: No slice closes while fewer workers than this can be in it.
        runs_ahead: By how many runs a worker may be ahead of the last result that it has.
        follows: Whether another shard decides how many contributions close a round. Without its
            plan for a round, none is made to serve for another one.

    Attributes:
        cutoff: The policy, or what has taken its place.
    """

    def __init__(
        self,
        num_workers: int,
        policy: CutoffPolicy,
        history_rounds: int = 4,
        history_bytes: int = 512 * 2**20,
        min_workers: int = 1,
        runs_ahead: int = 0,
        follows: bool = False,
    ) -> None:
        self.num_workers = num_workers
        self.replicas_to_aggregate = policy.replicas_to_aggregate(num_workers)
        self.counts = [WorkerCounts() for _ in range(num_workers)]
        self.rounds = 0
        self.cutoff = Cutoff(policy)
        self._min_workers = min_workers
        self._runs_ahead = runs_ahead
        self._follows = follows
        self._runs: dict[int, Run] = {}
        self._over = 0
        self._unsaid: list[RunOver] = []
        self._abstained: dict[int, set[int]] = {}
        self._abstentions = 0
        self._history = History(history_rounds, history_bytes)
        self._positions = Positions(num_workers)
        self._presence = Presence(num_workers)
        self._alarms = Alarms()
        # When the last round was closed that is over, and the run that it was of.
        self._closed_at = -math.inf
        self._last_round = -1
        # The plans for rounds to come, by the first run that each is for, and the last round's.
        self._plans: dict[int, Plan] = {}
        self._plan_before: Plan | None = None

    # What is known.

    @property
    def runs_over(self) -> int:
        """How many runs have been done by some worker; runs end in order."""
        return self._over

    @property
    def runs_announced(self) -> int:
        """How many runs workers have been told to be over."""
        return self._over - len(self._unsaid)

    @property
    def kept_from(self) -> int:
        """The first run whose results are kept."""
        return self._history.kept_from

    @property
    def history_size(self) -> int:
        """Bytes of results that are kept, runs in progress included."""
        return self._history.bytes

    @property
    def plan(self) -> tuple[int, Plan] | None:
        """The run in progress and the plan for its round, if there is one."""
        run = self._runs.get(self._over)
        plan = self._plan_for(self._over) if run is None else run.plan
        return None if plan is None else (self._over, plan)

    @property
    def last_plan(self) -> Plan | None:
        """The newest plan of a round that has begun."""
        plan = self.plan
        return self._plan_before if plan is None else plan[1]

    @property
    def wake_at(self) -> float | None:
        """When to call `tick` if nothing arrives before, in seconds; `None` for never."""
        return self._alarms.earliest

    def position(self, worker: int) -> int:
        """Returns the run that a worker is in or about to begin."""
        return self._positions[worker]

    def begun(self, worker: int) -> int:
        """Returns how many runs a worker has surely begun."""
        position = self._positions[worker]
        run = self._runs.get(position)
        return position + (run is not None and worker in run.arrivals)

    def exchanges(self, run: int) -> int:
        """Returns how many exchanges a run had that is over and kept."""
        return self._history.exchanges[run]

    def missing(self, run: int) -> list[int]:
        """Returns the present workers that have sent nothing for a run that is not over.

        Workers that have said that nothing will come are not among them.
        """
        arrivals = self._runs[run].arrivals if run in self._runs else {}
        return sorted(self._presence.present - set(arrivals) - self._abstained.get(run, set()))

    @property
    def awaited(self) -> frozenset[int]:
        """The workers that are there and take part."""
        return self._presence.awaited

    def holds_state(self, worker: int) -> bool:
        """Returns whether a worker's variables are those of the run that it is in."""
        return self._presence.holds_state(worker)

    def lacking(self) -> list[int]:
        """Returns the workers of which some have to come back before any slice closes."""
        there = self._presence.there
        return (
            sorted(set(range(self.num_workers)) - there) if len(there) < self._min_workers else []
        )

    def to_come(self, run: int) -> frozenset[int]:
        """Returns the workers from which values for a run may come, or have come."""
        abstained = self._abstained.get(run)
        return self.awaited - abstained if abstained else self.awaited

    def arrived(self, run: int) -> int:
        """Returns how many workers have sent something for a run that is not over."""
        return len(self._runs[run].arrivals) if run in self._runs else 0

    def is_open(self, worker: int, key: SliceKey, spec: SliceSpec) -> bool:
        """Returns whether values of a worker are to be expected in a slice, as far as is known."""
        at = self._positions[worker]
        if worker not in self._presence.present or key.run != at or at < self._over:
            return False
        exchanges = self._runs[at].exchanges if at in self._runs else {}
        state = exchanges.get(key.exchange, {}).get(key.slice)
        if state is None:
            return key.slice < spec.num_slices
        return state.spec == spec and not state.closed and worker not in state.contributors

    def end(self, run: int) -> int:
        """Returns where all can end when one worker wants to end after `run` runs.

        Whoever has some result of the last round in which something is closed may be computing for
        the next one, and nobody can have begun the one after that. Where updates are made in the
        next run, a worker may be one run further.
        """
        closed = [n for n, r in self._runs.items() if any(map(_any_closed, r.exchanges.values()))]
        last = max(self._over - 1, max(closed, default=-1))
        ahead = self._runs_ahead
        return max(run, last + 2 + ahead, max(self._positions) + 1 + ahead)

    def contributed(self, worker: int, run: int) -> tuple[int, int]:
        """Returns how many slices of a kept run have a worker's values, and how many there are."""
        used = total = 0
        for slices in self._runs[run].exchanges.values():
            for state in slices.values():
                used += worker in state.contributors
                total += 1
        return used, total

    def _plan_for(self, run: int) -> Plan | None:
        if not self._plans:
            return None
        made_for = max((r for r in self._plans if r <= run), default=None)
        return None if made_for is None else self._plans[made_for]


def _any_closed(slices: dict[int, SliceState]) -> bool:
    return any(s.closed for s in slices.values())
