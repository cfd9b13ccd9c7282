"""Who takes part in a job on one shard, from the first process to the last."""

import math
import random
import threading
import time
from collections.abc import Callable

from tf_syncdist import cutoff
from tf_syncdist.aggregation import waits
from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.centres import Centres
from tf_syncdist.aggregation.cutoff_relay import CutoffRelay
from tf_syncdist.aggregation.delivery import WINDOW_RUNS, Delivery
from tf_syncdist.aggregation.end_relay import EndRelay
from tf_syncdist.aggregation.gather_relay import GatherRelay
from tf_syncdist.aggregation.inbox import Inbox
from tf_syncdist.aggregation.limits import Quotas, default_worker_bytes
from tf_syncdist.aggregation.membership import Members
from tf_syncdist.aggregation.memory import ResultMemory, WorkerMemory
from tf_syncdist.aggregation.outbox import Outbox, Streams
from tf_syncdist.aggregation.planning import Planning
from tf_syncdist.aggregation.recording import TraceFile
from tf_syncdist.aggregation.records import Closed
from tf_syncdist.aggregation.recovery import GRACE_SECONDS
from tf_syncdist.aggregation.relays import StateRelay
from tf_syncdist.aggregation.restoring import Restoring
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.aggregation.withheld import Withheld
from tf_syncdist.mixing import centre_policies
from tf_syncdist.propagation.queue import Acknowledging
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.segments import host_id


class Attendance:
    """The state of a job, and what follows from workers that come and go. One lock guards it all.

    Args:
        clock: Returns the time in seconds; monotonic.
        on_event: Called with one line for the service's log.
        worker_bytes: How many bytes one worker may make the service keep; see `limits.Limits`.
        record_trace: File for the workers' times of each round; empty for none.

    Attributes:
        on_alarm: Called, with the lock held, when something has to be done earlier than was said.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[str], None] = lambda text: None,
        worker_bytes: int = 0,
        record_trace: str = "",
    ) -> None:
        self.on_alarm: Callable[[], None] = lambda: None
        self._record_trace = record_trace
        self._sleeps_until = -math.inf
        self._worker_bytes = worker_bytes or default_worker_bytes()
        self.done = threading.Event()
        self._clock = clock
        self._on_event = on_event
        self._lock = threading.Lock()
        # Where sums are made in order, whose turn it is may have changed.
        self._turned = threading.Condition(self._lock)
        self._hello: pb.Hello | None = None
        self._service = random.SystemRandom().getrandbits(63)
        self._seed = random.SystemRandom().getrandbits(63)
        self._streams = Streams()
        self._memories: dict[int, WorkerMemory] = {}
        self._host = host_id()
        self._present: set[int] = set()
        self._alone_since: float | None = None
        self._begun_at = 0.0
        # Where workers serve their own models.
        self._serves: dict[int, str] = {}
        # What workers mix their models with, if they do.
        self._centres: Centres | None = None
        # Whether all workers have come; from then on, those that come join a job in progress.
        self._started = False
        self._frozen = False
        self._restoring: Restoring | None = None
        # The run in progress when this service took the job over.
        self._restored_at = 0
        self._epoch = pb.EpochBegun()

    @property
    def in_progress(self) -> bool:
        """Whether workers have joined and not all of them have left."""
        return bool(self._present)

    # Starting.

    def _start(self, hello: pb.Hello) -> None:
        try:
            policy = cutoff.deserialize(hello.cutoff)
            mixes = centre_policies.deserialize(hello.centre) if hello.centre else None
            rounds = Rounds(
                hello.num_workers,
                policy,
                hello.history_rounds,
                hello.history_bytes,
                hello.min_workers,
                hello.runs_ahead,
                follows=hello.shard > 0,
            )
        except ValueError as e:
            raise invalid(str(e)) from e
        if hello.deterministic and not cutoff.waits_for_all(policy):
            raise invalid(
                "Expected a policy that waits for all workers, because sums are to be made in "
                f"their order. Received: cutoff={hello.cutoff}."
            )
        self._rounds = rounds
        memory = self._memory = ResultMemory(
            self._streams.tell_sharers, self._on_event, self._worker_bytes
        )
        self._quotas = Quotas(self._worker_bytes, rounds)
        self._delivery = Delivery(self._streams, rounds, memory, hello.deterministic)
        self._acknowledging: dict[int, Acknowledging] = {}
        self._inbox = Inbox()
        self._gathers = GatherRelay(
            hello.num_workers,
            rounds.cutoff,
            self._streams,
            rounds.begun,
            lambda: rounds.awaited,
            lambda: rounds.last_plan,
        )
        self._cutoffs = self._cutoff_relay(hello, policy, rounds)
        self._ends = EndRelay(
            hello.num_workers,
            rounds,
            self._streams,
            self._delivery.closed,
            not hello.shard,
            self._on_event,
        )
        self._relay = StateRelay(
            hello.num_workers,
            self._streams,
            rounds.position,
            self._givers,
            self._on_event,
            self._worker_bytes,
        )
        self._withheld = Withheld(rounds, self._streams, not hello.shard)
        self._members = Members(hello.num_workers, hello.detection_seconds)
        self._waits = waits.Waits()
        self._present = set(range(hello.num_workers))
        self._begun_at = self._clock()
        if mixes is not None:
            self._centres = Centres(
                mixes,
                hello.num_workers,
                self._streams,
                lambda: self._present,
                self._on_event,
                self._worker_bytes,
                decides=not hello.shard,
            )
        self._hello = hello

    def _cutoff_relay(
        self, hello: pb.Hello, policy: cutoff.CutoffPolicy, rounds: Rounds
    ) -> CutoffRelay:
        is_first = not hello.shard
        planner, is_planned = None, True
        try:
            planner = policy.planner(hello.num_workers)
            is_planned = planner is not None
        except Exception as e:  # noqa: BLE001 - no policy is worth a job
            # The other shards do not need what is missing.
            if is_first:
                rounds.cutoff.fail("begin to plan", e)
        relay = CutoffRelay(
            policy, is_planned, rounds, self._streams, hello.num_shards, is_first, self._on_event
        )
        if is_first and (planner is not None or self._record_trace):
            trace = None
            if self._record_trace:
                trace = TraceFile(self._record_trace, hello.num_workers, self._on_event)
            relay.planning = Planning(
                planner,
                hello.num_workers,
                self._on_plan,
                self._on_planner_failed,
                self._on_event,
                trace,
            )
        return relay

    def _on_plan(self, run: int, plan: cutoff.Plan) -> None:
        """Takes a plan for a round; called by the thread that plans."""
        with self._lock:
            if not self._frozen:
                self._close(self._rounds.set_plan(run, plan, self._clock()))
        self._publish()

    def _on_planner_failed(self, what: str, error: Exception) -> None:
        with self._lock:
            self._rounds.cutoff.fail(what, error)
            self._close(())

    def _givers(self) -> set[int]:
        """Returns the workers that have a state to give: those that have left, too."""
        return {w for w in self._streams if self._rounds.holds_state(w)} & self._members.here

    def _welcome(self, worker: int, void: bool = False, again: bool = False) -> None:
        welcome = pb.Welcome(
            job_seed=self._seed,
            window_runs=WINDOW_RUNS,
            host=self._host if self._streams[worker].opened is not None else "",
            run=self._rounds.position(worker),
            service=self._service,
            void=void,
            again=again,
            epoch=self._epoch if again else None,
        )
        self._streams.tell(worker, pb.ToWorker(welcome=welcome))

    def _tell_started(self, worker: int) -> None:
        """Tells workers to begin, when all have come, or the one that has joined the others."""
        workers = [worker]
        if not self._started:
            if len(self._members.have_come) < self._hello.num_workers:
                if self._serves[worker]:
                    # Workers that mix with one another begin without those that have not come.
                    self._tell_members()
                return
            self._started = True
            workers = list(self._streams)
            if self._centres is not None:
                self._centres.go_on()
        if self._restoring is not None:
            return
        # Who is told that all have come is to know already who they are.
        self._tell_members()
        for one in workers:
            run = self._rounds.position(one)
            started = pb.Started(
                in_progress=bool(self._rounds.runs_over), run=run, job_seed=self._seed
            )
            started.epoch.CopyFrom(self._epoch)
            self._streams.tell(one, pb.ToWorker(started=started))

    def _catch_up(self, worker: int) -> None:
        """Tells a worker that comes late what the others have been told and it may wait for."""
        self._ends.catch_up(worker)
        self._gathers.catch_up(worker)
        for segment in self._memory.offers() if self._streams[worker].opened is not None else ():
            self._streams.tell(worker, pb.ToWorker(segment=segment))
        self._cutoffs.catch_up(worker)
        self._delivery.catch_up(worker)

    # Being started again.

    def _begin_restoring(self, now: float) -> None:
        self._on_event("workers know a job that was in progress; collecting what they have")
        self._restoring = Restoring(now, self._streams)
        self._started = True
        if self._centres is not None:
            self._centres.hold()
        for worker in self._streams:
            self._restoring.add(worker, None, now)

    def _restore(self, now: float) -> None:
        """Goes on with the job once everything is there that workers know."""
        if not self._restoring.is_complete(now):
            return
        found, self._restoring = self._restoring, None
        self._seed, self._epoch = found.job_seed, found.epoch
        restored = found.restore(self._rounds, self._delivery, self._gathers, self._ends)
        self._restored_at = self._rounds.runs_over
        self._relay.know(found.variables)
        for worker in range(self._hello.num_workers):
            standing = found.standings.get(worker)
            if worker not in self._streams:
                self._leave(worker, for_good=True)
            else:
                self._enter(worker, None if standing is None else standing.run)
            if standing is not None and worker in self._streams:
                self._welcome(worker)
                self._catch_up(worker)
        self._on_event(f"going on with the job in round {self._rounds.runs_over}: {restored}")
        for worker in self._streams:
            self._tell_started(worker)
        if self._centres is not None:
            self._centres.go_on(found.standings)

    def _look_at_centre(self, now: float) -> None:
        """Does without the workers that have not come in time, which may have a newer centre."""
        if self._centres is not None and self._restoring is None:
            if now - self._begun_at > GRACE_SECONDS:
                self._centres.go_on()

    def _is_void(self, standing: pb.Standing) -> bool:
        """Returns whether a worker that was not there then may have what was computed anew."""
        first = self._restored_at
        has_some = any(held.run >= first and held.slices for held in standing.held)
        return standing.run > first or has_some

    # Who takes part.

    def _is_stream(self, worker: int, outbox: Outbox | None) -> bool:
        known = self._streams.get(worker)
        return known is not None and outbox in (None, known)

    def _hear(self, worker: int) -> None:
        self._members.hear(worker, self._clock())

    def _enter(self, worker: int, run: int | None) -> None:
        """Lets a worker take part: for the first time, again, or in place of its former process."""
        if worker in self._present and not self._started:
            return
        self._present.add(worker)
        self._rounds.enter(worker, run)
        self._relay.enter(worker)
        self._ends.enter(worker)
        if run is None:
            self._delivery.leave(worker)
            # Its program begins with the epoch, whatever state it is going to be given.
            self._gathers.enter(worker, self._epoch.run)

    def _silence(self, worker: int, now: float) -> None:
        if worker in self._present:
            self._say_gone(worker, f"is silent; {self._members.describe(worker, now)}")
            self._ends.leave(worker)
            self._consequences(self._rounds.silence(worker, now))
        self._tell_members()

    def _hear_again(self, worker: int) -> None:
        if worker in self._present:
            self._on_event(f"worker {worker} is heard of again")
            self._rounds.hear(worker)
            self._ends.enter(worker)
        self._tell_members()

    def _give_up(self, worker: int) -> None:
        """Keeps nothing any more for a worker that has been away for long."""
        self._rounds.leave(worker, self._clock(), for_good=True)
        self._delivery.leave(worker)
        self._relay.leave(worker)
        if self._centres is not None:
            self._centres.leave(worker, for_good=True)
        self._end_if_alone()

    def _leave(self, worker: int, for_good: bool) -> None:
        self._present.discard(worker)
        self._ends.leave(worker)
        if self._centres is not None:
            self._centres.leave(worker, for_good)
        if for_good:
            self._delivery.leave(worker)
        closed = self._rounds.leave(worker, self._clock(), for_good)
        if self._restoring is None:
            self._consequences(closed)
        self._relay.leave(worker, for_good)
        self._tell_members()
        self._end_if_alone()

    def _consequences(self, closed: tuple[Closed, ...]) -> None:
        """Acts on what may be decided now that a worker takes no part."""
        self._ends.decide()
        self._close(closed)
        self._gathers.close(self._clock())

    def _end_if_alone(self) -> None:
        if self._present:
            return
        self._streams.tell_all(pb.ToWorker(all_gone=pb.AllGone()))
        if not self._streams and (self._ends.is_over or not self._members.away):
            self.done.set()

    def _say_gone(self, worker: int, why: str) -> None:
        left = len(self._present - {worker})
        text = f"worker {worker} {why}; going on without it ({left} of {self._hello.num_workers})"
        self._on_event(text)
        self._streams.tell_all(pb.ToWorker(notice=pb.Notice(text=text)))

    def _tell_members(self) -> None:
        members = sorted(self._present & self._members.here)
        told = pb.Members(workers=members)
        if any(self._serves.values()):
            told.done.extend(sorted(self._members.here.intersection(self._streams) - set(members)))
            told.addresses.extend(self._serves.get(w, "") for w in told.workers)
            told.addresses_of_done.extend(self._serves.get(w, "") for w in told.done)
        self._streams.tell_all(pb.ToWorker(members=told))

    def _close(self, closed: tuple[Closed, ...]) -> None:
        """Closes slices, after something that may also have changed whose turn it is."""
        self._delivery.close(closed)
        self._turned.notify_all()
        self._withheld.ask(self._rounds.awaited)
        self._cutoffs.look(closed, self._clock())
        self._set_alarm()

    def _wake_at(self) -> float:
        """Returns when to ask the policy again."""
        times = (self._rounds.wake_at, self._gathers.wake_at)
        return min((t for t in times if t is not None), default=math.inf)

    def _set_alarm(self) -> None:
        """Tells whoever sleeps until later."""
        if self._wake_at() < self._sleeps_until:
            self._sleeps_until = -math.inf
            self.on_alarm()

    def _publish(self) -> None:
        """Sends the results that are complete; making them does not hold the lock."""
        while self._hello is not None:
            with self._lock:
                slot = self._delivery.next_ready()
            if slot is None:
                return
            slot.finish(self._rounds.replicas_to_aggregate)
            with self._lock:
                self._delivery.publish(slot)
