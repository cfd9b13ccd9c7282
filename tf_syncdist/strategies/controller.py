"""The training runs of one worker as they are executed, and what became of each."""

import collections
import functools
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from tf_syncdist.propagation.rows import Rows
from tf_syncdist.propagation.slices import Bucket, Plan, TensorSpec
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies.buffers import Buffers
from tf_syncdist.strategies.deferral import Deferral, Pending
from tf_syncdist.strategies.nonfinite import Inspection, zeros
from tf_syncdist.strategies.run_types import LocalReport, Mode, RunSite, StateStore
from tf_syncdist.transport.session import Session, State


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

    Attributes:
        offers_early: Whether parts of an exchange may be offered before all of it is there.
        input_may_end: Whether input of unknown length is being read. Where it ends is decided from
            what workers have finished, so no update waits for the next run then.
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
    ) -> None:
        self.run = 0
        self.error: BaseException | None = None
        self.is_running = False
        self._session = session
        self._store = store
        self._inspection = Inspection(nonfinite, session.config.worker)
        self.input_may_end = False
        self._updates_at_once = False
        self._said: set[str] = set()
        self.offers_early = overlaps and not self._inspection.looks
        self._cut = cut
        self._buffers = Buffers()
        self._on_begin = on_begin
        self._on_notice = on_notice
        self._clock = clock
        session.on_state_request = self.answer_state_requests
        self._plans: dict[tuple, Plan] = {}
        self._mode = Mode.COMPUTE
        self._site: RunSite | None = None
        self._explained: weakref.WeakSet = weakref.WeakSet()
        self._substitute = False
        self._late = False
        self._lost = False
        self._withheld = False
        self._deferral = Deferral(session, self._buffers, self._give_zeros)
        self._is_deferred = False
        self._exchange = 0
        self._over = False
        self._void = False
        self._input_pass: int | None = None
        self._read_ahead: collections.deque[tuple[int, int]] = collections.deque()
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
        with _recorded(self):
            self._on_begin()
            self._site = site
            self._session.begin_run(self.run)
            self._exchange = 0
            self._substitute = self._late = self._lost = self._withheld = False
            self._is_deferred = False
            self._inspection.begin_run()
            self.answer_state_requests()
            if self._deferral.pending is not None and self._deferral.pending.site is not site:
                self.settle()
            self._void = self._is_past_input()
            self._leave_ended_input()
            self._mode = self._decide(site)
            if self._mode is not Mode.COMPUTE and self._deferral.pending is not None:
                self.settle()
                self._mode = self._decide(site)
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
        with _recorded(self):
            self._send(way, way.buckets[number : number + 1], arrays)

    def exchange_last(
        self, way: Plan, number: int, arrays: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Gives the values for what has not been offered, and returns the result of the exchange.

        Args:
            way: How the exchange is cut.
            number: The first bucket that has not been offered.
            arrays: The tensors of this and later buckets, in their order.
        """
        with _recorded(self):
            if not self.offers_early:
                self._look_at(way, way.buckets[number:], arrays)
            self._send(way, way.buckets[number:], arrays)
            exchange, self._exchange = self._exchange, self._exchange + 1
            computes = self._mode is Mode.COMPUTE and not self._substitute
            return self._receive(exchange, way, computes)

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
        with _recorded(self):
            if not self.offers_early:
                self._look_at(way, way.buckets[number:], arrays)
            self._send(way, way.buckets[number:], arrays)
            self._deferral.hold(way, self._exchange, settings)
            self._exchange += 1
            self._is_deferred = True

    # Called by the graph of a run that continues the one before, in this order.

    def pending_settings(self) -> list[np.ndarray]:
        """Returns what the update of the run before needs besides."""
        with _recorded(self):
            return self._deferral.pending.settings

    def pending_part(self, number: int) -> list[np.ndarray]:
        """Waits for a bucket of the run before, and returns its tensors."""
        with _recorded(self):
            return self._deferral.receive(number)

    def finish_pending(self) -> None:
        """Ends the run before, whose update has been made."""
        with _recorded(self):
            if self._deferral.pending.lost:
                # What this run computes begins with nonsense, so it goes to nobody. Another state
                # takes its place when all of it is done, and not while it still writes.
                self._substitute = self._lost = True
                self._deferral.drop()
            else:
                self._deferral.finish()

    def withhold(self) -> None:
        """Keeps back what this worker would give in later exchanges of the run."""
        with _recorded(self):
            self._withhold()

    def stored(self, way: Plan) -> list[np.ndarray]:
        """Returns the stored result of the next exchange of a run that is replayed."""
        with _recorded(self):
            number, self._exchange = self._exchange, self._exchange + 1
            return self._receive(number, way, False)

    def finish(self, site: RunSite, outputs: Sequence[np.ndarray] | None) -> None:
        """Ends a run. `outputs` are kept for later replays of the site."""
        with _recorded(self):
            self.is_running = False
            if self._void:
                return
            if self._lost:
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
                fate = pb.LATE if self._late else fate
            else:
                fate = pb.REPLAYED
            # A thread that reads ahead may give this worker's state as soon as the run is finished.
            done, self.run = self.run, self.run + 1
            if self._is_deferred:
                pending = Pending(
                    site,
                    done,
                    self._exchange,
                    fate,
                    computes=not self._substitute,
                    nonfinite=self._inspection.found,
                    withheld=self._withheld,
                )
                self._deferral.begin(pending)
                if self.input_may_end or self._updates_at_once:
                    self.settle()
            else:
                self._session.finish(done, self._exchange, fate, self._inspection.found)
            self._last_end = self._clock()
            if self._first_end is None:
                self._first_end = self._last_end

    # Called from outside of runs.

    def settle(self) -> None:
        """Makes the update that waits for the next run, if there is one; does nothing in a run."""
        if not self.is_running and self.error is None:
            with _recorded(self):
                if self._deferral.settle():
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

    def begin_input(self) -> None:
        """Takes note that input is read anew; what was agreed about the last input has served."""
        self._read_ahead.clear()
        self.input_may_end = False
        if self._input_pass is not None and self.run > self._input_pass:
            self._session.leave_pass(self._input_pass)
            self._input_pass = None

    def begin_pass(self) -> int:
        """Returns the run with which input of unknown length begins; it is the name of the pass."""
        self._input_pass = self.run
        return self.run

    def has_read(self, input_pass: int, run: int) -> None:
        """Takes note that there is input for a run; where the pass ends may not be known yet."""
        self._read_ahead.append((input_pass, run))

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
            nonfinite=self._inspection.rounds,
        )

    def answer_state_requests(self) -> None:
        """Gives this worker's variables to workers that fell too far behind.

        Not while a run updates them. A worker that skips runs holds the state after these.
        """
        if self._lost:
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

    def _is_past_input(self) -> bool:
        """Returns whether input for this run was read ahead of where it ends for all workers."""
        while self._read_ahead:
            input_pass, run = self._read_ahead[0]
            end = self._session.end_of(input_pass)
            past = end is not None and end <= self.run
            if past or run <= self.run:
                self._read_ahead.popleft()
            if past or run >= self.run:
                return past
        return False

    def _leave_ended_input(self) -> None:
        """Takes note that this run is not one of the last input, if that has ended before it.

        Otherwise nobody would wait for the workers that had no more input for it.
        """
        if self._input_pass is not None and not self._void:
            end = self._session.end_of(self._input_pass)
            if end is not None and end <= self.run:
                self.begin_input()

    def _synchronise(self, site: RunSite) -> None:
        """Takes over worker 0's values of variables that this site trains for the first time."""
        if site.synchronised:
            return
        specs = self._store.unsynchronised(site)
        site.synchronised = True
        if not specs:
            return
        self._session.wait_started()
        if self._session.agree(self.run, specs):
            self._commit(specs)
            self._session.request_state(self.run, level_will_do=True)
            self._receive_state()
            self._on_notice(
                f"worker {self._session.config.worker} has taken over the state of round "
                f"{self._resume_at} and goes on from there"
            )
            return
        if self._session.config.worker == 0:
            self._session.give_state(0, self.run, self._store.read_new())
        else:
            self._store.assign_new(self._session.receive_state(specs).values)
        self._commit(specs)

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
        state: State = self._session.receive_state(self._store.specs())
        self._deferral.drop()
        self._store.assign(state.values)
        self._resume_at = state.run
        missed = state.rounds - sum(self._session.counts.values())
        self._session.resume(state.run, max(0, missed))

    def _send(self, way: Plan, buckets: Sequence[Bucket], arrays: Sequence[np.ndarray]) -> None:
        if self._mode is not Mode.COMPUTE or self._substitute or self._withheld:
            return
        if self._session.exchanges_of(self.run) is not None:
            if not self._late:
                self._session.send_late(self.run)
            self._late = True
        else:
            self._session.send(
                self.run, self._exchange, way, _by_number(way, buckets, arrays), buckets
            )

    def _withhold(self) -> None:
        if self._mode is Mode.COMPUTE and not self._substitute and not self._withheld:
            self._withheld = self._late = True
            self._session.send_late(self.run)

    def _look_at(self, way: Plan, buckets: Sequence[Bucket], arrays: Sequence[np.ndarray]) -> None:
        """Keeps an exchange's values back if they are to be finite and are not."""
        if self._mode is Mode.COMPUTE and not self._substitute and not self._withheld:
            tensors = _by_number(way, buckets, arrays)
            name_of = self._site.name_of
            if self._inspection.rejects(self.run, self._exchange, tensors, name_of):
                self._withhold()

    def _give_zeros(self, run: int, number: int, way: Plan) -> None:
        """Contributes to an exchange to which nobody else does either, so that it can end."""
        self._withheld = False
        self._session.send(run, number, way, zeros(way.specs))

    def _receive(self, number: int, way: Plan, computes: bool) -> list[np.ndarray]:
        results = self._buffers.take(way.specs)
        give_zeros = None
        if self._withheld:
            give_zeros = functools.partial(self._give_zeros, self.run, number, way)
        found = self._session.receive(self.run, number, way, results, give_zeros)
        if found is None:
            # The service heard so late of this run that it had forgotten the results. What the
            # run makes of zeros is overwritten by another worker's state when it ends.
            self._lost = True
            return [np.zeros(s.shape, s.dtype) for s in way.specs]
        used, total = found
        if computes and used < total:
            self._late = True
        return results


def _by_number(
    way: Plan, buckets: Sequence[Bucket], arrays: Sequence[np.ndarray]
) -> dict[int, np.ndarray | Rows]:
    found: dict[int, np.ndarray | Rows] = {}
    remaining = iter(arrays)
    for tensor in (t for bucket in buckets for t in bucket.tensors):
        array = next(remaining)
        if way.specs[tensor].by_rows:
            values = next(remaining)
            array = Rows(array.astype(np.int64), values.reshape(len(array), -1))
        found[tensor] = array
    return found


class _recorded:
    """Remembers an error that TensorFlow would otherwise bury in one of its own."""

    def __init__(self, controller: RunController) -> None:
        self._controller = controller

    def __enter__(self) -> None:
        if self._controller.error is not None:
            raise self._controller.error

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._controller.error is None:
            self._controller.error = error
