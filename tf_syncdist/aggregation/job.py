"""One job on one shard: the pure machines and the workers' outboxes behind one lock."""

import random
import threading
import time
from collections.abc import Callable

import grpc

from tf_syncdist import cutoff
from tf_syncdist.aggregation import admission, contributions, counters, waits
from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.delivery import WINDOW_RUNS, Delivery
from tf_syncdist.aggregation.end_relay import EndRelay
from tf_syncdist.aggregation.gather_relay import GatherRelay
from tf_syncdist.aggregation.membership import Members, NotAdmitted
from tf_syncdist.aggregation.memory import ResultMemory, WorkerMemory
from tf_syncdist.aggregation.outbox import Outbox, Refused, Streams
from tf_syncdist.aggregation.records import Closed, Fate, RoundError, SliceKey, SliceSpec, Verdict
from tf_syncdist.aggregation.relays import StateRelay
from tf_syncdist.aggregation.restoring import Restoring
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.aggregation.withheld import Withheld
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.segments import host_id

# A job that has begun is over when no worker has been connected for this long.
_ALONE_SECONDS = 60.0


class Job:
    """Everything the service knows about a job.

    Args:
        clock: Returns the time in seconds; monotonic.
        on_event: Called with one line for the service's log.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
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
        # Whether all workers have come; from then on, those that come join a job in progress.
        self._started = False
        self._frozen = False
        self._restoring: Restoring | None = None
        self._epoch = pb.EpochBegun()

    @property
    def in_progress(self) -> bool:
        """Whether workers have joined and not all of them have left."""
        return bool(self._present)

    # A worker's stream.

    def join(self, hello: pb.Hello) -> Outbox:
        """Lets a worker into the job and returns what it is told.

        Raises:
            Refused: If the worker believes to be in another job, or is already there.
        """
        with self._lock:
            admission.check(hello, self._hello)
            if self._hello is None:
                self._start(hello)
            worker, now = hello.worker, self._clock()
            standing = hello.standing if hello.HasField("standing") else None
            if standing is not None and not self._started and self._restoring is None:
                self._begin_restoring(now)
            if standing is not None and self._restoring is None:
                admission.check_standing(hello, self._seed, self._service, self._rounds.runs_over)
            try:
                same = self._members.admit(worker, hello.incarnation, hello.address, now)
            except NotAdmitted as e:
                code = grpc.StatusCode
                raise Refused(code.ABORTED if e.is_final else code.ALREADY_EXISTS, str(e)) from None
            before = self._streams.pop(worker, None)
            if before is not None:
                before.close()
            shares = bool(hello.host) and hello.host == self._host
            outbox = self._streams[worker] = Outbox(shares)
            self._memories[worker] = WorkerMemory()
            self._on_event(f"worker {worker} joined ({len(self._streams)} of {hello.num_workers})")
            if self._restoring is not None:
                self._restoring.add(worker, standing)
                if standing is None:
                    self._welcome(worker)
                self._restore(now)
            else:
                same = same or not self._started
                if standing is not None and standing.service != self._service:
                    self._enter(worker, standing.run)
                else:
                    self._enter(worker, self._rounds.position(worker) if same else None)
                self._welcome(worker)
                self._catch_up(worker)
            self._tell_started(worker)
        self._publish()
        return outbox

    def handle(self, worker: int, data: bytes, outbox: Outbox | None = None) -> None:
        """Acts on one message of a worker.

        Args:
            worker: The worker.
            data: The message.
            outbox: What `join` returned, if the worker may have connected again since.

        Raises:
            Refused: If it is no message that a correct worker would send.
        """
        try:
            header, payload = wire.decode(pb.ToAggregator, data)
            body = header.WhichOneof("body")
            if body == "contribution":
                self._contribute(worker, header.contribution, payload, outbox)
            else:
                with self._lock:
                    if not self._is_stream(worker, outbox):
                        # It was lost while this was on its way.
                        return
                    self._hear(worker)
                    handler = getattr(self, f"_on_{body}", None)
                    if handler is None:
                        there = f"Received: {body} from worker {worker}."
                        raise invalid(f"Expected Hello once. {there}")
                    handler(worker, getattr(header, body), payload)
            self._publish()
        except (wire.WireError, RoundError) as e:
            raise invalid(str(e)) from e

    def beat(self, worker: int, incarnation: int) -> float:
        """Takes note that a worker is alive; returns in how many seconds to say so again."""
        with self._lock:
            if self._hello is None or not self._members.is_life(worker, incarnation):
                return 1.0
            self._hear(worker)
            return self._members.patience_seconds() / 4

    def freeze(self) -> None:
        """Decides nothing any more: the service ends, and workers go on with the next one."""
        with self._lock:
            self._frozen = True

    def lost(self, worker: int, why: str, outbox: Outbox | None = None) -> None:
        """Takes note that a worker's stream is gone, orderly or not."""
        with self._lock:
            if self._frozen or not self._is_stream(worker, outbox):
                return
            self._streams.pop(worker).close()
            self._memories.pop(worker)
            self._turned.notify_all()
            now = self._clock()
            self._relay.drop(worker, now)
            is_away = worker in self._present
            self._members.lose(worker, now, for_good=not is_away)
            if self._restoring is not None:
                self._restoring.drop(worker)
            if is_away:
                self._say_gone(worker, f"is gone ({why})")
                self._leave(worker, for_good=False)
            self._end_if_alone()
        self._publish()

    def tick(self) -> None:
        """Lets time pass: asks the cutoff policy again and says for whom a round waits."""
        with self._lock:
            if self._hello is None or self._frozen:
                return
            now = self._clock()
            if self._restoring is not None:
                self._restore(now)
            changes = self._members.tick(now)
            for worker in changes.silent:
                self._silence(worker, now)
            for worker in changes.heard:
                self._hear_again(worker)
            for worker in changes.given_up:
                self._give_up(worker)
            if self._restoring is None:
                self._close(self._rounds.tick(now))
                self._gathers.close(now)
                self._relay.tick(now)
            for text in self._waits.due(self._rounds, self._relay, self._members, now):
                self._streams.tell_all(pb.ToWorker(notice=pb.Notice(text=text)))
            # Workers that never came, or died before they could, must not keep the service.
            self._alone_since = None if self._streams else self._alone_since or now
            if self._alone_since is not None and now - self._alone_since > _ALONE_SECONDS:
                self.done.set()
        self._publish()

    def report(self) -> pb.ReportReply:
        """Returns the counters of the job."""
        with self._lock:
            if self._hello is None:
                return pb.ReportReply()
            return counters.reply(self._rounds)

    # Starting.

    def _start(self, hello: pb.Hello) -> None:
        try:
            policy = cutoff.deserialize(hello.cutoff)
            rounds = Rounds(
                hello.num_workers,
                policy,
                hello.history_rounds,
                hello.history_bytes,
                hello.min_workers,
            )
        except ValueError as e:
            raise invalid(str(e)) from e
        if hello.deterministic and rounds.replicas_to_aggregate != hello.num_workers:
            raise invalid(
                "Expected a policy that waits for all workers, because sums are to be made in "
                f"their order. Received: cutoff={hello.cutoff}."
            )
        self._rounds = rounds
        memory = ResultMemory(self._streams.tell_sharers, self._on_event)
        self._memory = memory
        self._delivery = Delivery(self._streams, rounds, memory, hello.deterministic)
        self._gathers = GatherRelay(
            hello.num_workers,
            policy,
            hello.min_workers,
            self._streams,
            rounds.begun,
            lambda: rounds.awaited,
        )
        self._ends = EndRelay(
            hello.num_workers,
            rounds,
            self._streams,
            self._delivery.closed,
            not hello.shard,
            self._on_event,
        )
        self._relay = StateRelay(
            hello.num_workers, self._streams, rounds.position, self._givers, self._on_event
        )
        self._withheld = Withheld(rounds, self._streams, not hello.shard)
        self._members = Members(hello.num_workers, hello.detection_seconds)
        self._waits = waits.Waits()
        self._present = set(range(hello.num_workers))
        self._hello = hello

    def _givers(self) -> set[int]:
        """Returns the workers that have a state to give: those that have left, too."""
        return {w for w in self._streams if self._rounds.holds_state(w)} & self._members.here

    def _welcome(self, worker: int) -> None:
        welcome = pb.Welcome(
            job_seed=self._seed,
            window_runs=WINDOW_RUNS,
            host=self._host if self._streams[worker].opened is not None else "",
            run=self._rounds.position(worker),
            service=self._service,
        )
        self._streams.tell(worker, pb.ToWorker(welcome=welcome))

    def _tell_started(self, worker: int) -> None:
        """Tells workers to begin, when all have come, or the one that has joined the others."""
        workers = [worker]
        if not self._started:
            if len(self._members.have_come) < self._hello.num_workers:
                return
            self._started = True
            workers = list(self._streams)
        if self._restoring is not None:
            return
        for one in workers:
            run = self._rounds.position(one)
            started = pb.Started(in_progress=bool(self._rounds.runs_over), run=run)
            started.epoch.CopyFrom(self._epoch)
            self._streams.tell(one, pb.ToWorker(started=started))
        self._tell_members()

    def _catch_up(self, worker: int) -> None:
        """Tells a worker that comes late what the others have been told and it may wait for."""
        self._ends.catch_up(worker)
        self._gathers.catch_up(worker)
        for segment in self._memory.offers() if self._streams[worker].opened is not None else ():
            self._streams.tell(worker, pb.ToWorker(segment=segment))
        self._delivery.catch_up(worker)

    # Being started again.

    def _begin_restoring(self, now: float) -> None:
        self._on_event("workers know a job that was in progress; collecting what they have")
        self._restoring = Restoring(now, self._streams)
        self._started = True
        for worker in self._streams:
            self._restoring.add(worker, None)

    def _restore(self, now: float) -> None:
        """Goes on with the job once everything is there that workers know."""
        if not self._restoring.is_complete(now):
            return
        found, self._restoring = self._restoring, None
        self._seed, self._epoch = found.job_seed, found.epoch
        restored = found.restore(self._rounds, self._delivery, self._gathers, self._ends)
        self._relay.know(found.variables)
        for worker in range(self._hello.num_workers):
            standing = found.standings.get(worker)
            if worker not in self._streams or (standing is not None and standing.left):
                self._leave(worker, for_good=True)
            else:
                self._enter(worker, None if standing is None else standing.run)
            if standing is not None and worker in self._streams:
                self._welcome(worker)
                self._catch_up(worker)
        self._on_event(f"going on with the job in round {self._rounds.runs_over}: {restored}")
        for worker in self._streams:
            self._tell_started(worker)

    def _on_stored_result(self, worker: int, message: pb.Result, payload: memoryview) -> None:
        if self._restoring is not None:
            self._restoring.stored(worker, message, payload)
            self._restore(self._clock())

    def _on_stored_gather(self, worker: int, message: pb.GatherResult, payload: memoryview) -> None:
        if self._restoring is not None:
            self._restoring.stored_gather(message, payload)

    # Messages.

    def _contribute(
        self,
        worker: int,
        message: pb.Contribution,
        payload: memoryview,
        outbox: Outbox | None,
    ) -> None:
        """Adds a worker's values to a slice; the adding itself does not hold the lock."""
        in_memory = message.HasField("location")
        values = contributions.read(message, payload, self._memories.get(worker), worker)
        key = SliceKey(message.run, message.exchange, message.slice)
        name = pb.DataType.Name(message.dtype).lower()
        spec = SliceSpec(message.num_slices, name, message.elements, message.layout)
        with self._lock:
            # Values that lie in the worker's memory can wait there, at no cost for the service.
            while (
                self._hello.deterministic
                and not in_memory
                and self._is_stream(worker, outbox)
                and self._rounds.is_open(worker, key, spec)
                and not self._delivery.is_turn(worker, key)
            ):
                self._turned.wait(0.2)
                self._hear(worker)
            if not self._is_stream(worker, outbox):
                return
            self._hear(worker)
            self._delivery.check(key, message, worker)
            receipt = self._rounds.contribute(worker, key, spec, self._clock())
            slot = None
            if receipt.verdict is Verdict.ADD:
                slot = self._delivery.claim(key, message)
            self._ends.decide()
            self._close(receipt.closed)
            if self._gathers.waiting:
                self._gathers.close(self._clock())
        if slot is not None:
            slot.add(worker, values, in_turn=not in_memory)
            with self._lock:
                self._delivery.settle(slot, worker)
                if self._hello.deterministic:
                    self._turned.notify_all()

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

    def _close(self, closed: tuple[Closed, ...]) -> None:
        """Closes slices, after something that may also have changed whose turn it is."""
        self._delivery.close(closed)
        self._turned.notify_all()
        self._withheld.ask()

    def _on_segment(self, worker: int, message: pb.Segment, *_: object) -> None:
        if self._streams[worker].opened is None:
            raise invalid(
                "Expected memory from workers of the service's own host only. Received: segment "
                f"{message.id} from worker {worker}, which has not said that it is one."
            )
        answer = self._memories[worker].open(message)
        if answer.error:
            self._on_event(f"worker {worker} sends over gRPC: {answer.error}")
        self._streams.tell(worker, pb.ToWorker(segment_answer=answer))

    def _on_segment_answer(self, worker: int, message: pb.SegmentAnswer, *_: object) -> None:
        outbox = self._streams[worker]
        if outbox.opened is None or not self._memory.has(message.id):
            raise invalid(
                "Expected the answer to a segment that was offered. Received: segment "
                f"{message.id} from worker {worker}."
            )
        if message.error:
            self._on_event(f"worker {worker} receives over gRPC: {message.error}")
        else:
            outbox.opened.add(message.id)

    def _on_late(self, worker: int, message: pb.LateContribution, *_: object) -> None:
        self._close(self._rounds.late(worker, message.run, self._clock()))
        self._gathers.close(self._clock())

    def _on_run_finished(self, worker: int, message: pb.RunFinished, *_: object) -> None:
        try:
            fate = Fate(message.fate)
        except ValueError as e:
            raise invalid(f"Expected a fate. Received: fate={message.fate}.") from e
        progress = self._rounds.finish(worker, message.run, message.exchanges, fate)
        self._rounds.counts[worker].nonfinite += message.nonfinite > 0
        if progress.over:
            self._members.round_ended(self._clock())
        self._delivery.progress(worker, progress)
        self._ends.run_finished(message.run)
        self._gathers.forget(self._present)
        self._gathers.close(self._clock())

    def _on_resume(self, worker: int, message: pb.Resume, *_: object) -> None:
        self._rounds.resume(worker, message.run, message.missed)
        self._delivery.resumed(worker)

    def _on_gather(self, worker: int, message: pb.Gather, payload: memoryview) -> None:
        self._gathers.add(worker, message, payload, self._clock())

    def _on_stop_wish(self, worker: int, message: pb.StopWish, *_: object) -> None:
        if worker in self._present:
            self._ends.wish_stop(worker, message.fit, message.run)

    def _on_end_vote(self, worker: int, message: pb.EndVote, *_: object) -> None:
        if self._ends.vote(worker, message):
            closed = self._rounds.abstain(worker, message.run, self._clock())
            self._ends.answer_vote(worker, message.run)
            self._ends.decide()
            self._close(closed)

    def _on_enter_pass(self, worker: int, message: pb.EnterPass, *_: object) -> None:
        self._ends.enter_pass(message.input_pass)

    def _on_epoch_begun(self, worker: int, message: pb.EpochBegun, *_: object) -> None:
        if (message.fit, message.epoch) > (self._epoch.fit, self._epoch.epoch):
            self._epoch.CopyFrom(message)

    def _on_manifest(self, worker: int, message: pb.Manifest, *_: object) -> None:
        self._relay.manifest(worker, message)

    def _on_state_manifest(self, worker: int, message: pb.StateManifest, *_: object) -> None:
        self._relay.header(worker, message)

    def _on_state_chunk(self, worker: int, message: pb.StateChunk, payload: memoryview) -> None:
        self._relay.chunk(worker, message, payload)

    def _on_state_request(self, worker: int, message: pb.StateRequest, *_: object) -> None:
        # A giver can answer between two runs only, so no round may wait for the receiver.
        now = self._clock()
        self._close(self._rounds.suspend(worker, now))
        self._gathers.close(now)
        if not self._hello.shard:
            named = message.HasField("giver")
            level = named or message.level_will_do
            self._relay.ask(worker, message.giver if named else None, level, now)

    def _on_goodbye(self, worker: int, message: pb.Goodbye, *_: object) -> None:
        if message.reason not in pb.Leave.values():
            raise invalid(
                f"Expected a reason to leave. Received: reason={message.reason} from worker "
                f"{worker}."
            )
        reason = pb.Leave.Name(message.reason).lower()
        self._on_event(f"worker {worker} left after {message.run} run(s): {reason}")
        if message.reason == pb.FINISHED:
            self._ends.finished(worker, message.run)
        elif message.reason in (pb.FAILED, pb.PREEMPTED):
            self._say_gone(worker, f"has left ({reason})")
        self._leave(worker, for_good=True)

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
        self._end_if_alone()

    def _leave(self, worker: int, for_good: bool) -> None:
        self._present.discard(worker)
        self._ends.leave(worker)
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
        self._streams.tell_all(pb.ToWorker(members=pb.Members(workers=members)))
