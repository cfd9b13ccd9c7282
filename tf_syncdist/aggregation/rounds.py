"""The rounds of a job as a pure state machine: arrivals go in, decisions come out.

There is no clock, socket, lock or array in here. The service, the tests and the simulator run the
very same code; `now` is an argument.
"""

import enum
from typing import NamedTuple

from tf_syncdist.cutoff import CutoffPolicy, SliceView
from tf_syncdist.propagation.slices import ITEM_BYTES


class Fate(enum.IntEnum):
    """What became of a worker's part in a round; the numbers are those of the contract."""

    CONTRIBUTED = 1
    LATE = 2
    REPLAYED = 3
    MISSED = 4


class Verdict(enum.Enum):
    """What is to be done with the values that came with a contribution."""

    ADD = "add"
    LATE = "late"
    DUPLICATE = "duplicate"


class SliceKey(NamedTuple):
    """Names one slice: which run, which exchange in it, which slice of that."""

    run: int
    exchange: int
    slice: int


class SliceSpec(NamedTuple):
    """What workers must agree on about a slice."""

    num_slices: int
    dtype: str
    elements: int
    layout: int


class Closed(NamedTuple):
    """A slice that has just been closed."""

    key: SliceKey
    contributors: tuple[int, ...]
    reason: str


class Receipt(NamedTuple):
    """The answer to a contribution: on ADD, add the values before acting on `closed`."""

    verdict: Verdict
    closed: tuple[Closed, ...]
    reason: str


class RunOver(NamedTuple):
    """A run that is over, and how many exchanges it had."""

    run: int
    exchanges: int


class Progress(NamedTuple):
    """The answer to a finished run: which runs are over now, and which may be forgotten."""

    over: tuple[RunOver, ...]
    evicted: tuple[int, ...]


class RoundError(ValueError):
    """A message that a correct worker cannot send."""


class WorkerCounts:
    """Counters of one worker."""

    def __init__(self) -> None:
        self.fates = dict.fromkeys(Fate, 0)
        self.partly_used = 0
        self.nonfinite = 0
        self.delay_sum = 0.0
        self.delays = 0

    @property
    def replayed(self) -> int:
        """Rounds applied without computing, missed ones included."""
        return self.fates[Fate.REPLAYED] + self.fates[Fate.MISSED]

    @property
    def mean_delay_seconds(self) -> float:
        """Mean delay behind the first worker, over the rounds for which this one computed."""
        return self.delay_sum / self.delays if self.delays else 0.0


class _Slice:
    __slots__ = ("closed", "contributors", "spec")

    def __init__(self, spec: SliceSpec) -> None:
        self.spec = spec
        self.contributors: list[int] = []
        self.closed = False


class _Run:
    def __init__(self) -> None:
        self.exchanges: dict[int, dict[int, _Slice]] = {}
        self.arrivals: dict[int, float] = {}
        self.bytes = 0


class Rounds:
    """Decides, for every slice of every round, whose values are in it and when it closes.

    Args:
        num_workers: How many workers the job has.
        policy: The cutoff policy.
        history_rounds: Results are kept for at least this many rounds that are over, as long as
            a worker that is still there has not done them.
        history_bytes: And for more, while they need at most this many bytes.
    """

    def __init__(
        self,
        num_workers: int,
        policy: CutoffPolicy,
        history_rounds: int = 4,
        history_bytes: int = 512 * 2**20,
    ) -> None:
        self.num_workers = num_workers
        self.replicas_to_aggregate = policy.replicas_to_aggregate(num_workers)
        self.counts = [WorkerCounts() for _ in range(num_workers)]
        self.rounds = 0
        self._policy = policy
        self._history_rounds = history_rounds
        self._history_bytes = history_bytes
        self._runs: dict[int, _Run] = {}
        self._exchanges: dict[int, int] = {}
        self._over = 0
        self._unsaid: list[RunOver] = []
        self._suspended: set[int] = set()
        self._abstained: dict[int, set[int]] = {}
        self._kept_from = 0
        self._rounds_kept = 0
        self._positions = [0] * num_workers
        self._present = set(range(num_workers))

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
        return self._kept_from

    @property
    def history_size(self) -> int:
        """Bytes of results that are kept, runs in progress included."""
        return sum(run.bytes for run in self._runs.values())

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
        return self._exchanges[run]

    def missing(self, run: int) -> list[int]:
        """Returns the present workers that have sent nothing for a run that is not over.

        Workers that have said that nothing will come are not among them.
        """
        arrivals = self._runs[run].arrivals if run in self._runs else {}
        return sorted(self._present - set(arrivals) - self._abstained.get(run, set()))

    def to_come(self, run: int) -> set[int]:
        """Returns the workers from which values for a run may come, or have come."""
        return self._present - self._suspended - self._abstained.get(run, set())

    def arrived(self, run: int) -> int:
        """Returns how many workers have sent something for a run that is not over."""
        return len(self._runs[run].arrivals) if run in self._runs else 0

    def is_open(self, worker: int, key: SliceKey, spec: SliceSpec) -> bool:
        """Returns whether values of a worker are to be expected in a slice, as far as is known."""
        at = self._positions[worker]
        if worker not in self._present or key.run != at or at < self._over:
            return False
        exchanges = self._runs[at].exchanges if at in self._runs else {}
        state = exchanges.get(key.exchange, {}).get(key.slice)
        if state is None:
            return key.slice < spec.num_slices
        return state.spec == spec and not state.closed and worker not in state.contributors

    # What happens.

    def contribute(self, worker: int, key: SliceKey, spec: SliceSpec, now: float) -> Receipt:
        """Takes note of a contribution and decides what to do with its values.

        Args:
            worker: Index of the worker.
            key: The slice.
            spec: What the worker says about it.
            now: Time of arrival, in seconds.

        Returns:
            A `Receipt`.

        Raises:
            RoundError: If the message contradicts what this worker or others have said.
        """
        self._check_worker(worker)
        self._check_position(worker, key.run, "contribute to")
        if not 0 <= key.slice < spec.num_slices:
            raise RoundError(
                f"Expected a slice from 0 to {spec.num_slices - 1}. "
                f"Received: slice={key.slice} of exchange {key.exchange} in run {key.run} from "
                f"worker {worker}."
            )
        self._arrive(worker, key.run, now)
        self._abstained.get(key.run, set()).discard(worker)
        if key.run < self._kept_from:
            return Receipt(Verdict.LATE, (), f"run {key.run} is over and its results are gone")
        run = self._runs.setdefault(key.run, _Run())
        if key.run < self._over and key.exchange >= self._exchanges[key.run]:
            raise RoundError(
                f"Expected {self._exchanges[key.run]} exchange(s) in run {key.run}, as the worker "
                f"had that ended it. Received: exchange={key.exchange} from worker {worker}. "
                "Every worker must run the same program."
            )
        if key.run < self._over and key.slice not in run.exchanges.get(key.exchange, ()):
            return Receipt(Verdict.LATE, (), f"run {key.run} is over without this slice")
        state = self._slice(worker, run, key, spec)
        if worker in state.contributors:
            return Receipt(Verdict.DUPLICATE, (), f"worker {worker} is already in it")
        if state.closed:
            return Receipt(Verdict.LATE, (), f"closed with workers {state.contributors}")
        state.contributors.append(worker)
        closed = self._decide(key, run, state, now)
        return Receipt(Verdict.ADD, (closed,) if closed else (), closed.reason if closed else "")

    def late(self, worker: int, run: int, now: float) -> tuple[Closed, ...]:
        """Takes note that a worker has values which it does not send because they are late.

        Returns:
            The slices that this closes, because nothing more comes from the worker in this run.
        """
        self._check_worker(worker)
        self._check_position(worker, run, "be late for")
        self._arrive(worker, run, now)
        if run < self._over:
            return ()
        self._abstained.setdefault(run, set()).add(worker)
        return self.tick(now)

    def finish(self, worker: int, run: int, exchanges: int, fate: Fate) -> Progress:
        """Takes note that a worker has done a run; the first one to do so makes it over.

        Args:
            worker: Index of the worker.
            run: The run.
            exchanges: How many exchanges it had.
            fate: What became of the worker's part in it, as the worker has seen it.

        Returns:
            A `Progress`.

        Raises:
            RoundError: If the run cannot have ended like that.
        """
        self._check_worker(worker)
        self._check_position(worker, run, "finish")
        over: tuple[RunOver, ...] = ()
        if run >= self._over:
            if fate in (Fate.REPLAYED, Fate.MISSED):
                raise RoundError(
                    f"Expected run {run} to be over for a worker that did not compute it. "
                    f"Received: {fate.name} from worker {worker}, while {self._over} run(s) are."
                )
            self._check_all_closed(worker, run, exchanges)
            self._exchanges[run] = exchanges
            self._over = run + 1
            self._abstained = {r: w for r, w in self._abstained.items() if r > run}
            self.rounds += exchanges > 0
            self._rounds_kept += exchanges > 0
            # Where gradients are accumulated most runs have no exchange. Such a run is worth
            # computing until the exchange is closed that it contributes to.
            self._unsaid.append(RunOver(run, exchanges))
            if exchanges:
                over, self._unsaid = tuple(self._unsaid), []
        elif fate != Fate.MISSED and self._exchanges.get(run, exchanges) != exchanges:
            raise RoundError(
                f"Expected {self._exchanges[run]} exchange(s) in run {run}, as the worker had that "
                f"ended it. Received: exchanges={exchanges} from worker {worker}. "
                "Every worker must run the same program."
            )
        if self._exchanges.get(run, exchanges):
            self._count(worker, run, fate)
        self._positions[worker] = run + 1
        return Progress(over, self._evict())

    def leave(self, worker: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker and returns the slices that this closes."""
        self._present.discard(worker)
        return self.tick(now)

    def tick(self, now: float) -> tuple[Closed, ...]:
        """Asks the policy again about every open slice and returns those that close now."""
        closed = []
        for number, run in self._runs.items():
            for exchange, slices in run.exchanges.items():
                for index, state in slices.items():
                    if not state.closed and state.contributors:
                        key = SliceKey(number, exchange, index)
                        closed.append(self._decide(key, run, state, now))
        return tuple(c for c in closed if c)

    def end(self, run: int) -> int:
        """Returns where all can end when one worker wants to end after `run` runs.

        Whoever has some result of the last round in which something is closed may be computing for
        the next one, and nobody can have begun the one after that.
        """
        closed = [n for n, r in self._runs.items() if any(map(_any_closed, r.exchanges.values()))]
        last = max(self._over - 1, max(closed, default=-1))
        return max(run, last + 2, max(self._positions) + 1)

    def suspend(self, worker: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker until it is heard of again: it waits for another's state."""
        self._suspended.add(worker)
        return self.tick(now)

    def abstain(self, worker: int, run: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker in one round, and returns the slices that this closes.

        Harmless if the run is over or the worker is in it. A worker that waits for another's state
        may promise this meanwhile, so it is not heard of again by that.
        """
        if run < self._over or worker not in self._present or self.begun(worker) > run:
            return ()
        self._abstained.setdefault(run, set()).add(worker)
        return self.tick(now)

    def forget_abstentions(self) -> None:
        """Waits again for everybody that can come: the input pass is over in which they abstained.

        A round that did not take place in a pass is the first one of the next.
        """
        self._abstained.clear()

    def contributed(self, worker: int, run: int) -> tuple[int, int]:
        """Returns how many slices of a kept run have a worker's values, and how many there are."""
        slices = [s for e in self._runs[run].exchanges.values() for s in e.values()]
        return sum(worker in s.contributors for s in slices), len(slices)

    # How.

    def _check_worker(self, worker: int) -> None:
        self._suspended.discard(worker)
        if worker not in self._present:
            raise RoundError(
                f"Expected one of the present workers {sorted(self._present)}. "
                f"Received: worker={worker}."
            )

    def _check_position(self, worker: int, run: int, verb: str) -> None:
        if run != self._positions[worker]:
            raise RoundError(
                f"Expected worker {worker} to {verb} run {self._positions[worker]}, the one after "
                f"those that it has finished. Received: run={run}."
            )

    def _slice(self, worker: int, run: _Run, key: SliceKey, spec: SliceSpec) -> _Slice:
        slices = run.exchanges.setdefault(key.exchange, {})
        state = slices.get(key.slice)
        if state is None:
            other = next(iter(slices.values()), None)
            if other is not None:
                agreed = other.spec._replace(dtype=spec.dtype, elements=spec.elements)
                self._check_spec(worker, key, agreed, spec)
            state = slices[key.slice] = _Slice(spec)
        else:
            self._check_spec(worker, key, state.spec, spec)
        return state

    def _check_spec(self, worker: int, key: SliceKey, agreed: SliceSpec, spec: SliceSpec) -> None:
        if agreed == spec:
            return
        what = "shape or dtype" if agreed.layout == spec.layout else "list of shapes and dtypes"
        raise RoundError(
            f"Expected every worker to send the same {what} for slice {key.slice} of exchange "
            f"{key.exchange} in run {key.run}: {agreed.elements} x {agreed.dtype} in "
            f"{agreed.num_slices} slice(s), layout {agreed.layout:016x}, as the first worker did. "
            f"Received: {spec.elements} x {spec.dtype} in {spec.num_slices} slice(s), layout "
            f"{spec.layout:016x}, from worker {worker}. "
            "Build the same model and use the same optimizer on every worker."
        )

    def _arrive(self, worker: int, number: int, now: float) -> None:
        run = self._runs.get(number)
        if run is None:
            if number < self._kept_from:
                return
            run = self._runs[number] = _Run()
        if worker not in run.arrivals:
            run.arrivals[worker] = now
            counts = self.counts[worker]
            counts.delay_sum += now - min(run.arrivals.values())
            counts.delays += 1

    def _decide(self, key: SliceKey, run: _Run, state: _Slice, now: float) -> Closed | None:
        view = SliceView(
            now=now,
            opened_at=min(run.arrivals.values(), default=now),
            contributions=len(state.contributors),
            possible=len(self.to_come(key.run) | set(state.contributors)),
            num_workers=self.num_workers,
        )
        decision = self._policy.decide(view)
        if not decision.close:
            return None
        state.closed = True
        run.bytes += state.spec.elements * ITEM_BYTES[state.spec.dtype]
        return Closed(key, tuple(state.contributors), decision.reason)

    def _check_all_closed(self, worker: int, run: int, exchanges: int) -> None:
        known = self._runs[run].exchanges if run in self._runs else {}
        # A shard without any slice of an exchange knows nothing about it.
        for exchange in sorted(e for e in known if e < exchanges):
            slices = known[exchange]
            num_slices = next(iter(slices.values())).spec.num_slices
            if len(slices) < num_slices or not all(s.closed for s in slices.values()):
                raise RoundError(
                    f"Expected all slices of exchange {exchange} in run {run} to be closed before "
                    f"the run is finished. Received: exchanges={exchanges} from worker {worker}, "
                    f"while {sum(s.closed for s in slices.values())} of {num_slices} are closed."
                )
        if max(known, default=-1) >= exchanges:
            raise RoundError(
                f"Expected {max(known) + 1} or more exchange(s) in run {run}, as a worker has "
                f"contributed to. Received: exchanges={exchanges} from worker {worker}. "
                "Every worker must run the same program."
            )

    def _count(self, worker: int, run: int, fate: Fate) -> None:
        counts = self.counts[worker]
        if fate in (Fate.CONTRIBUTED, Fate.LATE) and run in self._runs:
            used, total = self.contributed(worker, run)
            if used < total:
                # With several shards the worker has seen more than this one, but never less.
                fate = Fate.LATE
            counts.partly_used += fate is Fate.LATE and used > 0
        counts.fates[fate] += 1

    def _evict(self) -> tuple[int, ...]:
        """Forgets runs that nobody needs or that are too many, oldest first."""
        evicted = []
        needed_from = min((self._positions[w] for w in self._present), default=self._over)
        size = self.history_size
        while self._kept_from < self._over:
            run = self._kept_from
            too_many = self._rounds_kept > self._history_rounds and size > self._history_bytes
            if run >= needed_from and not too_many:
                break
            state = self._runs.pop(run, None)
            size -= state.bytes if state else 0
            self._rounds_kept -= self._exchanges.pop(run) > 0
            self._kept_from = run + 1
            evicted.append(run)
        return tuple(evicted)


def _any_closed(slices: dict[int, _Slice]) -> bool:
    return any(s.closed for s in slices.values())
