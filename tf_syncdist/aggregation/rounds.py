"""The rounds of a job as a pure state machine: arrivals go in, decisions come out.

There is no clock, socket, lock or array in here. The service, the tests and the simulator run the
very same code; `now` is an argument.
"""

from collections.abc import Iterable, Mapping

from tf_syncdist.aggregation.agreement import SliceState, check_all_closed, check_spec
from tf_syncdist.aggregation.presence import Presence
from tf_syncdist.aggregation.records import (
    Closed,
    Fate,
    Progress,
    Receipt,
    RoundError,
    RunOver,
    SliceKey,
    SliceSpec,
    Verdict,
    WorkerCounts,
)
from tf_syncdist.cutoff import CutoffPolicy, SliceView
from tf_syncdist.propagation.slices import ITEM_BYTES

# Also of rounds without many bytes no more are kept, for a worker that is that far behind.
_MOST_RUNS_KEPT = 100_000


class _Run:
    def __init__(self) -> None:
        self.exchanges: dict[int, dict[int, SliceState]] = {}
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
        min_workers: No slice closes while fewer workers than this can be in it.
        runs_ahead: By how many runs a worker may be ahead of the last result that it has.
    """

    def __init__(
        self,
        num_workers: int,
        policy: CutoffPolicy,
        history_rounds: int = 4,
        history_bytes: int = 512 * 2**20,
        min_workers: int = 1,
        runs_ahead: int = 0,
    ) -> None:
        self.num_workers = num_workers
        self.replicas_to_aggregate = policy.replicas_to_aggregate(num_workers)
        self.counts = [WorkerCounts() for _ in range(num_workers)]
        self.rounds = 0
        self._policy = policy
        self._history_rounds = history_rounds
        self._history_bytes = history_bytes
        self._min_workers = min_workers
        self._runs_ahead = runs_ahead
        self._runs: dict[int, _Run] = {}
        self._exchanges: dict[int, int] = {}
        self._over = 0
        self._unsaid: list[RunOver] = []
        self._abstained: dict[int, set[int]] = {}
        self._kept_from = 0
        self._rounds_kept = 0
        self._positions = [0] * num_workers
        self._presence = Presence(num_workers)

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
        return sorted(self._presence.present - set(arrivals) - self._abstained.get(run, set()))

    @property
    def awaited(self) -> set[int]:
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

    def to_come(self, run: int) -> set[int]:
        """Returns the workers from which values for a run may come, or have come."""
        return self.awaited - self._abstained.get(run, set())

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
            known = self._runs[run].exchanges if run in self._runs else {}
            check_all_closed(known, worker, run, exchanges)
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

    def leave(self, worker: int, now: float, for_good: bool = True) -> tuple[Closed, ...]:
        """Stops waiting for a worker and returns the slices that this closes.

        Args:
            worker: The worker.
            now: Time, in seconds.
            for_good: Whether it will not come back to where it was. Otherwise the results that it
                needs next are kept, within the bounds of the history, until this is called again.
        """
        self._presence.leave(worker, for_good)
        return self.tick(now)

    def enter(self, worker: int, run: int | None) -> None:
        """Takes note that a worker is there again.

        Args:
            worker: The worker.
            run: The run that it is in. `None` stands for a new process, which takes over another's
                state; it is waited for when it is first heard of in a run.
        """
        if run is None:
            self._positions[worker] = max(self._over, self._positions[worker])
        else:
            self._positions[worker] = run
        self._presence.enter(worker, is_new=run is None)

    def resume(self, worker: int, run: int, missed: int) -> None:
        """Takes note that a worker has taken over the state before a run and goes on from there.

        Raises:
            RoundError: If it cannot have been given that state.
        """
        furthest = max(self._positions)
        if not self._positions[worker] <= run <= furthest or worker not in self._presence.present:
            raise RoundError(
                f"Expected worker {worker} to go on from a run between its own, "
                f"{self._positions[worker]}, and the furthest one, {furthest}. Received: run={run}."
            )
        self._positions[worker] = run
        self._presence.resume(worker)
        self.counts[worker].fates[Fate.MISSED] += missed

    def silence(self, worker: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker of which nothing is heard; returns what this closes."""
        self._presence.silence(worker)
        return self.tick(now)

    def hear(self, worker: int) -> None:
        """Waits again for a worker of which nothing was heard."""
        self._presence.hear(worker)

    def restore(
        self,
        positions: Mapping[int, int],
        counts: Mapping[int, Mapping[Fate, int]],
        exchanges: Mapping[int, int],
        closed: Iterable[tuple[SliceKey, SliceSpec, tuple[int, ...]]],
    ) -> None:
        """Takes over from a service that is gone what workers know of it.

        Args:
            positions: The run that each worker is in.
            counts: What each worker has counted.
            exchanges: For the newest runs that are over, without a gap, how many exchanges they
                had. Their results are all there.
            closed: The slices of these, and of the run in progress, that somebody has received.
        """
        for worker, run in positions.items():
            self._positions[worker] = run
            self.counts[worker].fates.update(counts[worker])
        self._over = max(positions.values())
        self._kept_from = self._over - len(exchanges)
        self._exchanges = dict(exchanges)
        self._rounds_kept = sum(n > 0 for n in exchanges.values())
        self.rounds = max((sum(c.values()) for c in counts.values()), default=0)
        self._positions = [
            max(p, self._kept_from) if w not in positions else p
            for w, p in enumerate(self._positions)
        ]
        for key, spec, contributors in closed:
            run_state = self._runs.setdefault(key.run, _Run())
            state = run_state.exchanges.setdefault(key.exchange, {})[key.slice] = SliceState(spec)
            state.contributors, state.closed = list(contributors), True
            run_state.bytes += spec.elements * ITEM_BYTES[spec.dtype]

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
        the next one, and nobody can have begun the one after that. Where updates are made in the
        next run, a worker may be one run further.
        """
        closed = [n for n, r in self._runs.items() if any(map(_any_closed, r.exchanges.values()))]
        last = max(self._over - 1, max(closed, default=-1))
        ahead = self._runs_ahead
        return max(run, last + 2 + ahead, max(self._positions) + 1 + ahead)

    def suspend(self, worker: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker until it is heard of again: it waits for another's state."""
        self._presence.suspend(worker)
        return self.tick(now)

    def abstain(self, worker: int, run: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker in one round, and returns the slices that this closes.

        Harmless if the run is over or the worker is in it. A worker that waits for another's state
        may promise this meanwhile, so it is not heard of again by that.
        """
        if run < self._over or worker not in self._presence.present or self.begun(worker) > run:
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
        self._presence.take_part(worker)
        if worker not in self._presence.present:
            raise RoundError(
                f"Expected one of the present workers {sorted(self._presence.present)}. "
                f"Received: worker={worker}."
            )

    def _check_position(self, worker: int, run: int, verb: str) -> None:
        if run != self._positions[worker]:
            raise RoundError(
                f"Expected worker {worker} to {verb} run {self._positions[worker]}, the one after "
                f"those that it has finished. Received: run={run}."
            )

    def _slice(self, worker: int, run: _Run, key: SliceKey, spec: SliceSpec) -> SliceState:
        slices = run.exchanges.setdefault(key.exchange, {})
        state = slices.get(key.slice)
        if state is None:
            other = next(iter(slices.values()), None)
            if other is not None:
                agreed = other.spec._replace(dtype=spec.dtype, elements=spec.elements)
                check_spec(worker, key, agreed, spec)
            state = slices[key.slice] = SliceState(spec)
        else:
            check_spec(worker, key, state.spec, spec)
        return state

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

    def _decide(self, key: SliceKey, run: _Run, state: SliceState, now: float) -> Closed | None:
        view = SliceView(
            now=now,
            opened_at=min(run.arrivals.values(), default=now),
            contributions=len(state.contributors),
            possible=len(self.to_come(key.run) | set(state.contributors)),
            num_workers=self.num_workers,
        )
        decision = self._policy.decide(view)
        if (
            not decision.close
            or len(self._presence.there | set(state.contributors)) < self._min_workers
        ):
            return None
        state.closed = True
        run.bytes += state.spec.elements * ITEM_BYTES[state.spec.dtype]
        return Closed(key, tuple(state.contributors), decision.reason)

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
        needing = self._presence.present | self._presence.away
        needed_from = min((self._positions[w] for w in needing), default=self._over)
        size = self.history_size
        while self._kept_from < self._over:
            run = self._kept_from
            many = size > self._history_bytes or self._over - run > _MOST_RUNS_KEPT
            too_many = self._rounds_kept > self._history_rounds and many
            if run >= needed_from and not too_many:
                break
            state = self._runs.pop(run, None)
            size -= state.bytes if state else 0
            self._rounds_kept -= self._exchanges.pop(run) > 0
            self._kept_from = run + 1
            evicted.append(run)
        return tuple(evicted)


def _any_closed(slices: dict[int, SliceState]) -> bool:
    return any(s.closed for s in slices.values())
