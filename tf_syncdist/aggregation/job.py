"""One job on one shard: the pure machines and the workers' outboxes behind one lock."""

import math

import grpc

from tf_syncdist.aggregation import admission, contributions, counters
from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.attendance import Attendance
from tf_syncdist.aggregation.centre import values_of
from tf_syncdist.aggregation.gathers import KEPT
from tf_syncdist.aggregation.membership import NotAdmitted
from tf_syncdist.aggregation.memory import WorkerMemory
from tf_syncdist.aggregation.outbox import Outbox, Refused
from tf_syncdist.aggregation.records import Fate, RoundError, SliceKey, SliceSpec, Verdict
from tf_syncdist.propagation.queue import Acknowledging, Urgency
from tf_syncdist.propagation.slices import ITEM_BYTES
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# Workers give up before this, by their own `timeout_seconds`.
_TURN_SECONDS = 3600.0

# A job that has begun is over when no worker has been connected for this long.
_ALONE_SECONDS = 60.0


class Job(Attendance):
    """Everything the service knows about a job, and what it does with a worker's messages.

    Args:
        clock: Returns the time in seconds; monotonic.
        on_event: Called with one line for the service's log.
        worker_bytes: How many bytes one worker may make the service keep; see `limits.Limits`.
        record_trace: File for the workers' times of each round; empty for none.
    """

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
            was_here = worker in self._members.have_come
            try:
                same = self._members.admit(worker, hello.incarnation, hello.address, now)
            except NotAdmitted as e:
                code = grpc.StatusCode
                raise Refused(code.ABORTED if e.is_final else code.ALREADY_EXISTS, str(e)) from None
            before = self._streams.pop(worker, None)
            if before is not None:
                before.close()
            shares = bool(hello.host) and hello.host == self._host
            outbox = self._streams[worker] = Outbox(
                shares, self._worker_bytes, self._hello.credit_bytes
            )
            self._acknowledging[worker] = Acknowledging(hello.credit_bytes)
            self._quotas.begin(worker)
            if self._centres is not None:
                self._centres.reopen(worker)
                if standing is None:
                    self._centres.begin(worker)
            self._serves[worker] = hello.serves
            self._memories[worker] = WorkerMemory()
            self._on_event(f"worker {worker} joined ({len(self._streams)} of {hello.num_workers})")
            if self._restoring is not None:
                self._restoring.add(worker, standing, now)
                if standing is None:
                    self._welcome(worker)
                self._restore(now)
            else:
                is_late = standing is not None and standing.service != self._service
                if is_late:
                    self._enter(worker, standing.run)
                else:
                    same = same or not self._started
                    self._enter(worker, self._rounds.position(worker) if same else None)
                void = is_late and self._is_void(standing)
                self._welcome(worker, void, again=was_here and standing is None)
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
            self._quotas.check(worker, body, header, payload.nbytes)
            if body == "contribution":
                self._receive(worker, header.contribution, payload, outbox)
            elif body == "centre_request":
                self._mix(worker, header.centre_request, payload, outbox)
            else:
                # What follows a contribution may be about it.
                self._inbox.wait_for(outbox)
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
                    self._set_alarm()
            self._publish()
        except (wire.WireError, RoundError) as e:
            raise invalid(str(e)) from e

    def beat(self, worker: int, incarnation: int) -> float:
        """Takes note that a worker is alive; returns in how many seconds to say so again."""
        with self._lock:
            if self._hello is None or not self._members.is_life(worker, incarnation):
                return 1.0
            return self._members.beat(worker, self._clock())

    def freeze(self) -> None:
        """Decides nothing any more: the service ends, and workers go on with the next one."""
        with self._lock:
            self._frozen = True

    def close(self) -> None:
        """Ends what goes on in the background. May be called twice."""
        self.freeze()
        if self._hello is not None:
            self._cutoffs.close()

    def lost(self, worker: int, why: str, outbox: Outbox | None = None) -> None:
        """Takes note that a worker's stream is gone, orderly or not."""
        with self._lock:
            if not self._is_stream(worker, outbox):
                return
            # Also where nothing is decided any more: the stream's threads are to end.
            self._streams.pop(worker).close()
            self._memories.pop(worker)
            self._turned.notify_all()
            if self._frozen:
                return
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
            self._look_at_centre(now)
            centre = self._centres.waits() if self._centres is not None else ()
            for text in self._waits.due(
                self._rounds, self._relay.waiting_for(), self._members, now, centre
            ):
                self._streams.tell_all(pb.ToWorker(notice=pb.Notice(text=text)))
            # Workers that never came, or died before they could, must not keep the service.
            self._alone_since = None if self._streams else self._alone_since or now
            if self._alone_since is not None and now - self._alone_since > _ALONE_SECONDS:
                self.done.set()
        self._publish()

    def seconds_to_sleep(self, most: float) -> float:
        """Returns for how long nothing has to be done if nothing happens, at most so many seconds.

        `on_alarm` is called if something that happens changes that. Then, or when the time is over,
        call `ring`.
        """
        with self._lock:
            if self._hello is None or self._frozen or self._restoring is not None:
                return most
            now = self._clock()
            self._sleeps_until = min(self._wake_at(), now + most)
            return max(0.0, self._sleeps_until - now)

    def ring(self) -> None:
        """Asks the cutoff policy again if it is time to."""
        with self._lock:
            if self._hello is None or self._frozen or self._restoring is not None:
                return
            now = self._clock()
            if now < self._wake_at():
                return
            self._close(self._rounds.tick(now))
            self._gathers.close(now)
        self._publish()

    def report(self) -> pb.ReportReply:
        """Returns the counters of the job."""
        with self._lock:
            if self._hello is None:
                return pb.ReportReply()
            reply = counters.reply(self._rounds, self._cutoffs.report())
            if self._centres is not None:
                self._centres.report(reply)
            return reply

    # Messages.

    def _on_stored_result(self, worker: int, message: pb.Result, payload: memoryview) -> None:
        if self._restoring is not None:
            self._restoring.stored(worker, message, payload)
            self._restore(self._clock())

    def _on_stored_gather(self, worker: int, message: pb.GatherResult, payload: memoryview) -> None:
        if self._restoring is not None:
            self._restoring.stored_gather(message, payload)
        elif (message.kind, message.serial) in KEPT:
            # The job went on at once, for want of anything else that workers knew.
            self._gathers.restore(message, payload)

    def _receive(
        self, worker: int, message: pb.Contribution, payload: memoryview, outbox: Outbox | None
    ) -> None:
        """Adds a contribution, or another worker's that is more urgent."""
        # Where sums are made in order, adding one may have to wait for another.
        if not self._hello.credit_bytes or self._hello.deterministic:
            self._contribute(worker, message, payload, outbox)
            return

        def contribute() -> None:
            try:
                self._contribute(worker, message, payload, outbox)
            except (RoundError, Refused) as e:
                # The thread that finds this may be another worker's.
                refusal = e if isinstance(e, Refused) else invalid(str(e))
                with self._lock:
                    if self._is_stream(worker, outbox):
                        self._streams[worker].close(refusal)

        urgency = Urgency(message.run, message.exchange, message.priority)
        self._inbox.put_and_do(outbox, urgency, contribute)

    def _contribute(
        self,
        worker: int,
        message: pb.Contribution,
        payload: memoryview,
        outbox: Outbox | None,
    ) -> None:
        """Adds a worker's values to a slice; the adding itself does not hold the lock."""
        _check_seconds(message.elapsed_seconds, worker)
        in_memory = message.HasField("location")
        values = contributions.read(message, payload, self._memories.get(worker), worker)
        key = SliceKey(message.run, message.exchange, message.slice)
        name = pb.DataType.Name(message.dtype).lower()
        spec = SliceSpec(message.num_slices, name, message.elements, message.layout)
        with self._lock:
            # Values that lie in the worker's memory can wait there, at no cost for the service.
            deadline = self._clock() + _TURN_SECONDS
            while (
                self._hello.deterministic
                and not in_memory
                and self._is_stream(worker, outbox)
                and self._rounds.is_open(worker, key, spec)
                and not self._delivery.is_turn(worker, key)
            ):
                self._turned.wait(0.2)
                self._hear(worker)
                if self._clock() > deadline:
                    raise invalid(
                        f"Expected the workers before worker {worker} to contribute to run "
                        f"{key.run} within {_TURN_SECONDS:g} s. Received: nothing from one of them."
                    )
            if not self._is_stream(worker, outbox):
                return
            self._hear(worker)
            self._delivery.check(key, message, worker)
            elapsed = message.elapsed_seconds
            receipt = self._rounds.contribute(worker, key, spec, self._clock(), elapsed)
            slot = None
            if receipt.verdict is Verdict.ADD:
                slot = self._delivery.claim(key, message)
            self._ends.decide()
            self._close(receipt.closed)
            if self._gathers.waiting:
                self._gathers.close(self._clock())
                self._set_alarm()
        if slot is not None:
            slot.add(worker, values, in_turn=not in_memory)
            with self._lock:
                self._delivery.settle(slot, worker)
                if self._hello.deterministic:
                    self._turned.notify_all()
        if self._hello.credit_bytes:
            self._acknowledge(worker, spec)

    def _on_centre_open(self, worker: int, message: pb.CentreOpen, *_: object) -> None:
        if self._centres is None:
            raise invalid(f"Expected a job with a centre. Received: worker {worker} asks for one.")
        self._centres.open(worker, message)

    def _mix(
        self, worker: int, request: pb.CentreRequest, payload: memoryview, outbox: Outbox | None
    ) -> None:
        """Serves a request about the centre; copying values does not hold the lock."""
        with self._lock:
            if not self._is_stream(worker, outbox):
                return
            self._hear(worker)
            if self._centres is None:
                raise invalid(
                    f"Expected a job with a centre. Received: worker {worker} asks for one."
                )
            values = values_of(request, payload, self._memories.get(worker), worker)
            if request.action == pb.CENTRE_GIVE:
                self._centres.give(worker, request, values)
                return
            part = self._centres.claim(worker, request)
        answer = part.serve(worker, request, values)
        with self._lock:
            if self._is_stream(worker, outbox):
                self._streams[worker].put(answer)

    def _acknowledge(self, worker: int, spec: SliceSpec) -> None:
        """Lets a worker send more."""
        with self._lock:
            nbytes = self._acknowledging[worker].arrived(spec.elements * ITEM_BYTES[spec.dtype])
            if nbytes:
                self._streams.tell(worker, pb.ToWorker(ack=pb.Ack(bytes=nbytes)))

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

    def _on_ack(self, worker: int, message: pb.Ack, *_: object) -> None:
        self._streams[worker].acknowledge(message.bytes)

    def _on_late(self, worker: int, message: pb.LateContribution, *_: object) -> None:
        _check_seconds(message.elapsed_seconds, worker)
        elapsed = message.elapsed_seconds
        self._close(self._rounds.late(worker, message.run, self._clock(), elapsed))
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
            self._cutoffs.ended(progress.times)
        self._delivery.progress(worker, progress)
        self._ends.run_finished(message.run)
        self._gathers.forget(worker, self._present)
        self._gathers.close(self._clock())

    def _on_resume(self, worker: int, message: pb.Resume, *_: object) -> None:
        before = self._rounds.position(worker)
        self._rounds.resume(worker, message.run, message.missed)
        self._gathers.skip(worker, before)
        self._delivery.resumed(worker)

    def _on_cutoff_plan(self, worker: int, message: pb.CutoffPlan, *_: object) -> None:
        self._close(self._cutoffs.take_plan(worker, message, self._clock()))

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


def _check_seconds(elapsed_seconds: float, worker: int) -> None:
    if not 0 <= elapsed_seconds < math.inf:
        raise invalid(
            "Expected a time of at least 0 s for which a worker has been computing. Received: "
            f"elapsed_seconds={elapsed_seconds} from worker {worker}."
        )
