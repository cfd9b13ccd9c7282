"""The rounds of a job as a pure state machine: arrivals go in, decisions come out.

There is no clock, socket or lock in here. The service, the tests and the simulator run the very
same code; `now` is an argument. What is done with every arrival takes the same time however many
workers there are.
"""

from collections.abc import Iterable, Mapping

from tf_syncdist.aggregation.agreement import SliceState, check_all_closed, check_spec
from tf_syncdist.aggregation.known_rounds import KnownRounds, Run
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
)
from tf_syncdist.aggregation.timing import RoundTimer
from tf_syncdist.cutoff import Plan, RoundTimes, SliceView
from tf_syncdist.propagation.slices import ITEM_BYTES

# Plans come for one round after the other; more of them are not for rounds that follow.
_MOST_PLANS = 16


class Rounds(KnownRounds):
    """Decides, for every slice of every round, whose values are in it and when it closes."""

    # What happens.

    def contribute(
        self,
        worker: int,
        key: SliceKey,
        spec: SliceSpec,
        now: float,
        elapsed_seconds: float = 0.0,
    ) -> Receipt:
        """Takes note of a contribution and decides what to do with its values.

        Args:
            worker: Index of the worker.
            key: The slice.
            spec: What the worker says about it.
            now: Time of arrival, in seconds.
            elapsed_seconds: How long the worker has been computing for the round, by its own
                clock.

        Returns:
            A `Receipt`.

        Raises:
            RoundError: If the message contradicts what this worker or others have said.
        """
        self._check(worker, key.run, "contribute to")
        if not 0 <= key.slice < spec.num_slices:
            raise RoundError(
                f"Expected a slice from 0 to {spec.num_slices - 1}. "
                f"Received: slice={key.slice} of exchange {key.exchange} in run {key.run} from "
                f"worker {worker}."
            )
        run = self._arrive(worker, key.run, now)
        if run is None:
            return Receipt(Verdict.LATE, (), f"run {key.run} is over and its results are gone")
        if self._abstained:
            self._expect(worker, key.run)
        if key.run < self._over:
            self._check_exchange(worker, key)
            if key.slice not in run.exchanges.get(key.exchange, ()):
                return Receipt(Verdict.LATE, (), f"run {key.run} is over without this slice")
        state = self._slice(worker, run, key, spec)
        if worker in state.contributors:
            return Receipt(Verdict.DUPLICATE, (), f"worker {worker} is already in it")
        if run.timer is not None:
            run.timer.arrive(worker, now, elapsed_seconds)
        if state.closed:
            return Receipt(Verdict.LATE, (), f"closed with {len(state.contributors)} workers")
        state.contributors[worker] = None
        if worker not in self._presence.awaited:
            state.stamp = -1
        elif len(state.contributors) < state.ask_at and state.stamp == self._stamp:
            return _ADDED
        closed = self._decide(key, run, state, now)
        return Receipt(Verdict.ADD, (closed,), closed.reason) if closed else _ADDED

    def late(
        self, worker: int, run: int, now: float, elapsed_seconds: float = 0.0
    ) -> tuple[Closed, ...]:
        """Takes note that a worker has values which it does not send because they are late.

        Returns:
            The slices that this closes, because nothing more comes from the worker in this run.
        """
        self._check(worker, run, "be late for")
        state = self._arrive(worker, run, now)
        if state is None or run < self._over:
            return ()
        state.timer.arrive_whole(worker, now, elapsed_seconds)
        self._do_without(worker, run)
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
        self._check(worker, run, "finish")
        over: tuple[RunOver, ...] = ()
        times: tuple[RoundTimes, ...] = ()
        history = self._history
        if run >= self._over:
            if fate in (Fate.REPLAYED, Fate.MISSED):
                raise RoundError(
                    f"Expected run {run} to be over for a worker that did not compute it. "
                    f"Received: {fate.name} from worker {worker}, while {self._over} run(s) are."
                )
            known = self._runs[run].exchanges if run in self._runs else {}
            check_all_closed(known, worker, run, exchanges)
            times = self._end_round(run) if exchanges else ()
            history.add(run, exchanges)
            self._over = run + 1
            self._abstained = {r: w for r, w in self._abstained.items() if r > run}
            self.rounds += exchanges > 0
            # Where gradients are accumulated most runs have no exchange. Such a run is worth
            # computing until the exchange is closed that it contributes to.
            self._unsaid.append(RunOver(run, exchanges))
            if exchanges:
                over, self._unsaid = tuple(self._unsaid), []
        known = history.exchanges.get(run, exchanges)
        if known != exchanges and fate != _MISSED:
            raise _unlike(known, run, f"exchanges={exchanges}", worker)
        if known:
            self._count(worker, run, fate)
        self._positions.advance(worker)
        evicted = self._evict()
        return Progress(over, evicted, times) if over or evicted or times else _DONE

    def set_plan(self, run: int, plan: Plan, now: float) -> tuple[Closed, ...]:
        """Takes a plan for the first round from a run on; only the first one for it counts.

        Args:
            run: The run.
            plan: The plan.
            now: Time, in seconds.

        Returns:
            The slices that this closes.
        """
        if run <= self._last_round or len(self._plans) >= _MOST_PLANS:
            return ()
        self._plans.setdefault(run, plan)
        state = self._runs.get(self._over)
        if state is None or state.plan is not None:
            return ()
        state.plan = self._plan_for(self._over)
        return self.tick(now)

    def leave(self, worker: int, now: float, for_good: bool = True) -> tuple[Closed, ...]:
        """Stops waiting for a worker and returns the slices that this closes.

        Args:
            worker: The worker.
            now: Time, in seconds.
            for_good: Whether it will not come back to where it was. Otherwise the results that it
                needs next are kept, within the bounds of the history, until this is called again.
        """
        self._presence.leave(worker, for_good)
        self._positions.forget()
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
        self._history.restore(self._over, dict(exchanges))
        self.rounds = max((sum(c.values()) for c in counts.values()), default=0)
        for worker in set(range(self.num_workers)) - set(positions):
            self._positions[worker] = max(self._positions[worker], self.kept_from)
        for key, spec, contributors in closed:
            run = self._run(key.run)
            run.timer.is_partial = True
            state = run.exchanges.setdefault(key.exchange, {})[key.slice] = SliceState(spec)
            state.contributors, state.closed = dict.fromkeys(contributors), True
            self._keep(run, spec)

    def tick(self, now: float) -> tuple[Closed, ...]:
        """Asks the policy again about every open slice and returns those that close now."""
        # All slices of the runs before are closed, and of later ones there are none.
        run = self._runs.get(self._over)
        if run is None:
            return ()
        closed = []
        for exchange, slices in run.exchanges.items():
            for index, state in slices.items():
                if not state.closed and state.contributors:
                    key = SliceKey(self._over, exchange, index)
                    closed.append(self._decide(key, run, state, now))
        return tuple(c for c in closed if c)

    def suspend(self, worker: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker that waits for another's state.

        It is waited for again when it has resumed, and is heard of in a round after that.
        """
        self._presence.suspend(worker)
        return self.tick(now)

    def abstain(self, worker: int, run: int, now: float) -> tuple[Closed, ...]:
        """Stops waiting for a worker in one round, and returns the slices that this closes.

        Harmless if the run is over or the worker is in it. A worker that waits for another's state
        may promise this meanwhile, so it is not heard of again by that.
        """
        if run < self._over or worker not in self._presence.present or self.begun(worker) > run:
            return ()
        self._do_without(worker, run)
        return self.tick(now)

    def forget_abstentions(self) -> None:
        """Waits again for everybody that can come: the input pass is over in which they abstained.

        A round that did not take place in a pass is the first one of the next.
        """
        self._abstained.clear()
        self._abstentions += 1

    # How.

    def _check(self, worker: int, run: int, verb: str) -> None:
        presence = self._presence
        if worker not in presence.awaited:
            presence.take_part(worker)
            if worker not in presence.present:
                raise RoundError(
                    f"Expected one of the present workers {sorted(presence.present)}. "
                    f"Received: worker={worker}."
                )
        if run != self._positions[worker]:
            raise RoundError(
                f"Expected worker {worker} to {verb} run {self._positions[worker]}, the one after "
                f"those that it has finished. Received: run={run}."
            )

    def _slice(self, worker: int, run: Run, key: SliceKey, spec: SliceSpec) -> SliceState:
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

    def _check_exchange(self, worker: int, key: SliceKey) -> None:
        known = self._history.exchanges[key.run]
        if key.exchange >= known:
            raise _unlike(known, key.run, f"exchange={key.exchange}", worker)

    def _run(self, number: int) -> Run:
        run = self._runs.get(number)
        if run is None:
            timer = RoundTimer(self.num_workers, self._closed_at)
            run = self._runs[number] = Run(timer, self._plan_for(number))
        return run

    def _arrive(self, worker: int, number: int, now: float) -> Run | None:
        """Returns the run that a worker is heard of in, unless it is forgotten."""
        if number < self._history.kept_from:
            return None
        run = self._runs.get(number) or self._run(number)
        if worker not in run.arrivals:
            if not run.arrivals:
                run.began_at = now
            run.arrivals[worker] = now
            counts = self.counts[worker]
            counts.delay_sum += now - run.began_at
            counts.delays += 1
        return run

    def _do_without(self, worker: int, run: int) -> None:
        self._abstained.setdefault(run, set()).add(worker)
        self._abstentions += 1

    def _expect(self, worker: int, run: int) -> None:
        abstained = self._abstained.get(run, ())
        if worker in abstained:
            abstained.remove(worker)
            self._abstentions += 1

    @property
    def _stamp(self) -> int:
        """Changes whenever others can contribute than before."""
        return self._presence.version + self._abstentions

    def _decide(self, key: SliceKey, run: Run, state: SliceState, now: float) -> Closed | None:
        if state.stamp != self._stamp:
            state.stamp = self._stamp
            state.possible = len(self.to_come(key.run) | state.contributors.keys())
        view = SliceView(
            now,
            run.began_at,
            len(state.contributors),
            state.possible,
            self.num_workers,
            run.plan,
        )
        decision = self.cutoff.decide(view)
        state.ask_at = decision.ask_at or 0
        if run.plan is None and self._plan_before is not None and not decision.close:
            # Nobody is to wait for a plan that takes longer to make than the round lasts.
            again = self.cutoff.decide(view._replace(plan=self._plan_before))
            state.ask_at = again.ask_at or 0
            if again.close:
                decision, run.plan = again, self._plan_before
        if decision.wait_until != state.wait_until:
            self._alarms.set(state, decision.wait_until)
        if not decision.close or not self._are_enough(state):
            return None
        state.closed = True
        run.timer.close(now)
        self._keep(run, state.spec)
        return Closed(key, tuple(state.contributors), decision.reason)

    def _are_enough(self, state: SliceState) -> bool:
        if self._min_workers == 1:
            return True
        return len(self._presence.there | state.contributors.keys()) >= self._min_workers

    def _keep(self, run: Run, spec: SliceSpec) -> None:
        nbytes = spec.elements * ITEM_BYTES[spec.dtype]
        run.bytes += nbytes
        self._history.bytes += nbytes

    def _end_round(self, number: int) -> tuple[RoundTimes, ...]:
        """Takes note that a round is over; returns how long it took, if that is known."""
        self._last_round = number
        self._plans = {r: p for r, p in self._plans.items() if r > number}
        state = self._runs.get(number)
        if state is None:
            # A shard need not have a slice of every exchange.
            return ()
        if not self._follows:
            self._plan_before = state.plan or self._plan_before
        timer, state.timer = state.timer, None
        if timer.closed_at is not None:
            self._closed_at = timer.closed_at
        times = timer.times(number, state.slices, self.to_come(number))
        return () if times is None else (times,)

    def _count(self, worker: int, run: int, fate: Fate) -> None:
        counts = self.counts[worker]
        if (fate == _CONTRIBUTED or fate == _LATE) and run in self._runs:
            used, total = self.contributed(worker, run)
            if used < total:
                # With several shards the worker has seen more than this one, but never less.
                fate = _LATE
            counts.partly_used += fate == _LATE and used > 0
        counts.fates[fate] += 1

    def _evict(self) -> tuple[int, ...]:
        if self._positions.is_known and not self._history.is_full:
            return ()
        presence = self._presence
        needed_from = self._positions.lowest(lambda: presence.present | presence.away, self._over)
        return self._history.evict(self._over, needed_from, self._forget)

    def _forget(self, run: int) -> int:
        state = self._runs.pop(run, None)
        return state.bytes if state else 0


# Looking a member of an enumeration up takes longer than what is done with it.
_CONTRIBUTED, _LATE, _MISSED = Fate.CONTRIBUTED, Fate.LATE, Fate.MISSED

_ADDED = Receipt(Verdict.ADD, (), "")
_DONE = Progress((), ())


def _unlike(known: int, run: int, received: str, worker: int) -> RoundError:
    return RoundError(
        f"Expected {known} exchange(s) in run {run}, as the worker had that ended it. Received: "
        f"{received} from worker {worker}. Every worker must run the same program."
    )
