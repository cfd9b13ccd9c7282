"""The training runs of one worker as they are executed, and what became of each."""

import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from tf_syncdist.propagation.slices import Plan, TensorSpec
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies.deferral import Deferral, Pending
from tf_syncdist.strategies.input_passes import InputPasses
from tf_syncdist.strategies.nonfinite import Inspection
from tf_syncdist.strategies.propagation_chooser import PropagationChooser
from tf_syncdist.strategies.recorded import recorded
from tf_syncdist.strategies.run_exchanges import RunExchanges
from tf_syncdist.strategies.run_timeline import RunTimeline
from tf_syncdist.strategies.run_types import LocalReport, Mode, RunSite, StateStore
from tf_syncdist.transport.session import Session


class RunController:
    """Takes a worker through its runs. TensorFlow's graph calls it; it knows no TensorFlow.

    Args:
        session: The connection to the service.
        store: The common variables.
        cut: Cuts the tensors of an exchange, given when the forward pass uses each first if that is
            known.
        on_begin: Called at the start of every training run.
        on_notice: Called with a line for the user.
        clock: Returns the time in seconds; monotonic.
        nonfinite: See `SyncReplicasStrategy`.
        overlaps: Whether sending overlaps with backpropagation.
        chooses: Whether it is measured in the first rounds how gradients are to travel.

    Attributes:
        offers_early: Whether parts of an exchange may be offered before all of it is there.
        input: What is known of the input that runs are given.
    """

    def __init__(
        self,
        session: Session,
        store: StateStore,
        cut: Callable[[Sequence[TensorSpec], Sequence[int] | None], Plan],
        on_begin: Callable[[], None],
        on_notice: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        nonfinite: str = "pass",
        overlaps: bool = True,
        chooses: bool = False,
    ) -> None:
        self.run = 0
        self.error: BaseException | None = None
        self.is_running = False
        self._session = session
        self._store = store
        self._exchanges = RunExchanges(session, Inspection(nonfinite, session.config.worker))
        self.input = InputPasses(session)
        self._updates_at_once = False
        self._said: set[str] = set()
        self.offers_early = overlaps and not self._exchanges.inspection.looks
        self._cut = cut
        self._on_begin = on_begin
        self._on_notice = on_notice
        self._clock = clock
        session.on_state_request = self.answer_state_requests
        self._plans: dict[tuple, Plan] = {}
        self._mode = Mode.COMPUTE
        self._site: RunSite | None = None
        self._explained: weakref.WeakSet = weakref.WeakSet()
        self._substitute = False
        self._timeline = RunTimeline(session.config.timeline)
        self._deferral = Deferral(
            session, self._exchanges.buffers, self._exchanges.give_zeros, self._timeline, clock
        )
        self._auto = PropagationChooser(session, self.say_once) if chooses else None
        self._begun_at = self._sent_at = 0.0
        self._is_deferred = False
        self._over = False
        self._void = False
        self._resume_at = 0
        self._computed = 0
        self._first_end: float | None = None
        self._last_end = 0.0

    def plan(self, specs: Sequence[TensorSpec], priorities: Sequence[int] | None = None) -> Plan:
        """Returns how the tensors of an exchange are cut.

        Args:
            specs: The tensors.
            priorities: When the forward pass uses each of them first, if that is known.
        """
        key = (tuple(specs), None if priorities is None else tuple(priorities))
        if key not in self._plans:
            self._plans[key] = self._cut(*key)
        return self._plans[key]

    # Called by the graph, in this order.

    def begin(self, site: RunSite) -> Mode:
        """Begins a run and decides what it does."""
        with recorded(self):
            self._on_begin()
            self._site = site
            self._session.begin_run(self.run)
            self._exchanges.begin(self.run, site)
            self._substitute = self._is_deferred = False
            self.answer_state_requests()
            if self._deferral.pending is not None and self._deferral.pending.site is not site:
                self.settle()
            self._void = self.input.is_past(self.run)
            if not self._void:
                self.input.leave_ended(self.run)
            self._mode = self._decide(site)
            if self._mode is not Mode.COMPUTE and self._deferral.pending is not None:
                self.settle()
                self._mode = self._decide(site)
            if self._auto is not None and site.num_deferred_slices and not self._void:
                self._auto.begin(self.run, site.num_deferred_slices)
            self._begun_at = self._clock()
            if self._mode is Mode.COMPUTE:
                self._session.pace.begin(self.run)
            self._timeline.begin(self.run)
            self._exchanges.gives = self._mode is Mode.COMPUTE and not self._substitute
            # Another thread may be looking at a variable just now.
            with self._deferral.lock:
                self.is_running = True
                continues = self._mode is Mode.COMPUTE and self._deferral.pending is not None
            return Mode.CONTINUE if continues else self._mode

    def exchange(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Gives this worker's values for the next exchange of the run and returns the result."""
        way = self.plan([TensorSpec(a.dtype.name, a.shape) for a in arrays])
        return self.exchange_last(way, 0, [arrays[t] for b in way.buckets for t in b.tensors])

    def offer(self, way: Plan, number: int, arrays: Sequence[np.ndarray]) -> None:
        """Gives this worker's values for one bucket of the next exchange, as soon as it has them.

        Args:
            way: How the exchange is cut.
            number: Of the bucket.
            arrays: The bucket's tensors, in its order. One that travels by rows is two arrays: the
                numbers of the rows, and the rows.
        """
        with recorded(self):
            self._send(way, slice(number, number + 1), arrays)

    def exchange_last(
        self, way: Plan, number: int, arrays: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Gives the values for what has not been offered, and returns the result of the exchange.

        Args:
            way: How the exchange is cut.
            number: The first bucket that has not been offered.
            arrays: The tensors of this and later buckets, in their order.
        """
        with recorded(self):
            self._send_last(way, number, arrays)
            self._timeline.computed()
            found = self._exchanges.receive(self._exchanges.next(), way, self._exchanges.gives)
            self._timeline.applies(self.run)
            return found

    def offer_last(
        self, way: Plan, number: int, settings: Sequence[np.ndarray], arrays: Sequence[np.ndarray]
    ) -> None:
        """Gives the values for what has not been offered; the result is applied in the next run.

        Args:
            way: How the exchange is cut.
            number: The first bucket that has not been offered.
            settings: What the update needs of this run besides.
            arrays: The tensors of this and later buckets, in their order.
        """
        with recorded(self):
            self._send_last(way, number, arrays)
            self._deferral.hold(self._used(way), self._exchanges.next(), settings)
            self._is_deferred = True
            self._sent_at = self._clock()
            self._timeline.computed()

    # Called by the graph of a run that continues the one before, in this order.

    def pending_settings(self) -> list[np.ndarray]:
        """Returns what the update of the run before needs besides."""
        with recorded(self):
            return self._deferral.pending.settings

    def pending_part(self, number: int) -> list[np.ndarray]:
        """Waits for a bucket of the run before, and returns its tensors."""
        with recorded(self):
            return self._deferral.receive(number)

    def finish_pending(self) -> None:
        """Ends the run before, whose update has been made."""
        with recorded(self):
            if self._deferral.pending.lost:
                # What this run computes begins with nonsense, so it goes to nobody. Another state
                # takes its place when all of it is done, and not while it still writes.
                self._substitute = self._exchanges.lost = True
                self._exchanges.gives = False
                self._deferral.drop()
            else:
                self._deferral.finish()

    def withhold(self) -> None:
        """Keeps back what this worker would give in later exchanges of the run."""
        with recorded(self):
            self._exchanges.withhold()

    def stored(self, way: Plan) -> list[np.ndarray]:
        """Returns the stored result of the next exchange of a run that is replayed."""
        with recorded(self):
            return self._exchanges.receive(self._exchanges.next(), self._used(way), False)

    def finish(self, site: RunSite, outputs: Sequence[np.ndarray] | None) -> None:
        """Ends a run. `outputs` are kept for later replays of the site."""
        with recorded(self):
            self.is_running = False
            self._timeline.applied()
            if self._void:
                return
            if self._exchanges.lost:
                self._refresh()
                while self._resume_at <= self.run:
                    # Only the run before is in that state. This one is left to the others.
                    self._session.send_late(self.run)
                    self._session.wait_over(self.run)
                    self._refresh()
                self._mode = Mode.SKIP
            if self._mode is Mode.SKIP or self.run < self._resume_at:
                self.run += 1
                return
            if self._mode is Mode.COMPUTE:
                site.outputs = None if outputs is None else [np.array(o) for o in outputs]
                fate = pb.REPLAYED if self._substitute else pb.CONTRIBUTED
                self._computed += 1
                fate = pb.LATE if self._exchanges.late else fate
            else:
                fate = pb.REPLAYED
            # A thread that reads ahead may give this worker's state as soon as the run is finished.
            done, self.run = self.run, self.run + 1
            if self._is_deferred:
                pending = Pending(
                    site,
                    done,
                    self._exchanges.count,
                    fate,
                    computes=not self._substitute,
                    nonfinite=self._exchanges.inspection.found,
                    withheld=self._exchanges.withheld,
                )
                self._deferral.begin(pending)
                in_order = self._auto is not None and self._auto.in_order
                if self.input.may_end or self._updates_at_once or in_order:
                    self.settle()
                if in_order:
                    waited = self._deferral.received_at - self._sent_at
                    self._auto.measured(done, self._sent_at - self._begun_at, waited)
            else:
                found = self._exchanges.inspection.found
                self._session.finish(done, self._exchanges.count, fate, found)
            self._last_end = self._clock()
            if self._first_end is None:
                self._first_end = self._last_end

    # Called from outside of runs.

    def settle(self) -> None:
        """Makes the update that waits for the next run, if there is one; does nothing in a run."""
        if self._deferral.pending is None or self.error is not None:
            return
        with recorded(self), self._deferral.lock:
            if not self.is_running and self._deferral.settle():
                self._refresh()

    def update_at_once(self, why: str) -> None:
        """Lets no update wait for the next run any more."""
        self.settle()
        self._updates_at_once = True
        self.say_once(f"updates are made at the end of each run, not in the next one: {why}")

    def say_once(self, text: str) -> None:
        """Tells the user something that is the same on all workers, and once only."""
        if text not in self._said and self._session.config.worker == 0:
            self._on_notice(text)
        self._said.add(text)

    def is_pending(self, variable: int) -> bool:
        """Returns whether a variable, by its identity, has yet to be updated."""
        pending = self._deferral.pending
        return (
            pending is not None and not self.is_running and pending.site.defers_update_of(variable)
        )

    @property
    def runs_done(self) -> tuple[int, int]:
        """How many runs this worker has done, and how many of them it computed."""
        return self.run, self._computed

    @property
    def is_ahead(self) -> bool:
        """Whether this worker's variables are those of a later run, so that it skips runs."""
        return self.run < self._resume_at

    def replays(self, run: int) -> bool:
        """Returns whether a coming run is surely not going to be computed."""
        site = self._site
        if run < self._resume_at:
            return True
        if site is None or not site.replayable or site.outputs is None:
            return False
        return self._session.exchanges_of(run) is not None

    def report(self) -> LocalReport:
        """Returns this worker's counts."""
        fates = self._session.counts
        return LocalReport(
            worker=self._session.config.worker,
            num_workers=self._session.config.num_workers,
            rounds=sum(fates.values()),
            contributed=fates[pb.CONTRIBUTED],
            late=fates[pb.LATE],
            replayed=fates[pb.REPLAYED] + fates[pb.MISSED],
            missed=fates[pb.MISSED],
            wall_seconds=self._last_end - self._first_end if self._first_end else 0.0,
            nonfinite=self._exchanges.inspection.rounds,
        )

    def answer_state_requests(self) -> None:
        """Gives this worker's variables to workers that fell too far behind.

        Not while a run updates them. A worker that skips runs holds the state after these.
        """
        if self._exchanges.lost:
            return
        requests = self._session.take_state_requests()
        if requests:
            self.settle()
        for request in requests:
            run = max(self.run, self._resume_at)
            rounds = sum(self._session.counts.values())
            values, specs = self._store.read(), self._store.specs()
            self._session.give_state(request, run, values, specs, rounds)

    def start_at(self, run: int) -> None:
        """Counts this worker's runs from a later one: it has come while the job was in progress."""
        self.run = max(self.run, run)

    def mend(self, giver: int, names: Sequence[str]) -> None:
        """Takes over another worker's variables, because this worker's have come to differ.

        Args:
            giver: The worker whose variables are taken over.
            names: The variables that differ.
        """
        more = f" and {len(names) - 1} more variable(s)" if len(names) > 1 else ""
        self.settle()
        self._on_notice(
            f"worker {self._session.config.worker} differs from worker {giver} in {names[0]!r}"
            f"{more} after {self.run} run(s): it takes over that worker's variables"
        )
        self._take_over(giver)

    # How.

    def _send_last(self, way: Plan, number: int, arrays: Sequence[np.ndarray]) -> None:
        if not self.offers_early:
            self._exchanges.look_at(way, way.buckets[number:], arrays)
        self._send(way, slice(number, None), arrays)

    def _send(self, way: Plan, numbers: slice, arrays: Sequence[np.ndarray]) -> None:
        used = self._used(way)
        if used is way:
            self._exchanges.send(way, way.buckets[numbers], arrays)
        else:
            self._exchanges.send_as(used, way, way.buckets[numbers], arrays)

    def _used(self, way: Plan) -> Plan:
        """Returns how an exchange travels now, of which a trace knows how it may."""
        in_order = self._auto is not None and self._auto.in_order
        return self.plan(way.specs) if in_order else way

    def _decide(self, site: RunSite) -> Mode:
        over = self._session.job_over_at()
        if over is not None and self.run >= over[0]:
            self._void = True
            if not self._over:
                self._over = True
                self._on_notice(
                    f"worker {over[1]}'s program ended, and the job with it after {over[0]} "
                    "run(s); further training runs do nothing"
                )
        if self._void:
            return Mode.SKIP
        self._synchronise(site)
        if self.run < self._resume_at:
            return Mode.SKIP
        if self._session.exchanges_of(self.run) is None:
            return Mode.COMPUTE
        there = self._session.wait_results(self.run)
        if there is False:
            self._refresh()
        if not there:
            return self._decide(site)
        if site.outputs is None:
            return Mode.COMPUTE
        if not site.replayable:
            self._substitute = True
            if site not in self._explained:
                self._explained.add(site)
                self._on_notice(
                    f"worker {self._session.config.worker} executes the whole training function, "
                    "with stored results, also in rounds that are over, because "
                    f"{site.unlike_replay}"
                )
            return Mode.COMPUTE
        return Mode.REPLAY

    def _synchronise(self, site: RunSite) -> None:
        """Takes over worker 0's values of variables that this site trains for the first time."""
        if site.synchronised:
            return
        specs = self._store.unsynchronised(site)
        site.synchronised = True
        if not specs:
            return
        self._session.wait_started()
        if not self._session.agree(self.run, specs):
            if self._session.config.worker == 0:
                self._session.give_state(0, self.run, self._store.read_new())
                self._commit(specs)
                return
            state = self._session.receive_state(specs)
            if state is not None:
                self._store.assign_new(state.values)
                self._commit(specs)
                return
        # The others train them already.
        self._commit(specs)
        self._session.request_state(self.run, level_will_do=True)
        self._receive_state()
        self._on_notice(
            f"worker {self._session.config.worker} has taken over the state of round "
            f"{self._resume_at} and goes on from there"
        )

    def _commit(self, specs: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
        self._store.commit()
        self._session.hold(specs)

    def _refresh(self) -> None:
        """Takes over the state of an up-to-date worker."""
        self._take_over(None)
        self._on_notice(
            f"worker {self._session.config.worker} was too far behind in round {self.run}: it has "
            f"taken over the state of round {self._resume_at} and skips the rounds between"
        )

    def _take_over(self, giver: int | None) -> None:
        self._session.request_state(self.run, giver)
        self._receive_state()

    def _receive_state(self) -> None:
        """Takes over the state that was asked for; runs before it are skipped."""
        state = self._session.receive_state(self._store.specs())
        self._deferral.drop()
        self._store.assign(state.values)
        self._resume_at = state.run
        missed = state.rounds - sum(self._session.counts.values())
        self._session.resume(state.run, max(0, missed))
