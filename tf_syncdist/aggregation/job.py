"""One job on one shard: the pure machines and the workers' outboxes behind one lock."""

import random
import threading
import time
from collections.abc import Callable

import grpc
import numpy as np

from tf_syncdist import cutoff
from tf_syncdist.aggregation import admission, contributions, counters, sums
from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.delivery import WINDOW_RUNS, Delivery
from tf_syncdist.aggregation.endings import Ended, Endings
from tf_syncdist.aggregation.gathers import GatherKey, Gathers, Part
from tf_syncdist.aggregation.memory import ResultMemory, WorkerMemory
from tf_syncdist.aggregation.outbox import Outbox, Refused, Streams
from tf_syncdist.aggregation.relays import StateRelay
from tf_syncdist.aggregation.rounds import (
    Closed,
    Fate,
    RoundError,
    Rounds,
    SliceKey,
    SliceSpec,
    Verdict,
)
from tf_syncdist.aggregation.withheld import Withheld
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.segments import host_id

_NOTICE_SECONDS = 10.0

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
        self._seed = random.SystemRandom().getrandbits(63)
        self._streams = Streams()
        self._memories: dict[int, WorkerMemory] = {}
        self._host = host_id()
        self._present: set[int] = set()
        self._alone_since: float | None = None
        self._over_at: tuple[int, int] | None = None
        # For every training that is stopped, the number of runs and who wished it.
        self._stops: dict[int, tuple[int, int]] = {}

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
            worker = hello.worker
            if worker in self._streams or worker not in self._present:
                there = "is connected" if worker in self._streams else "has left"
                raise Refused(
                    grpc.StatusCode.ALREADY_EXISTS,
                    f"Expected every worker of a job to connect once. Received: worker={worker}, "
                    f"which {there}. Start one process per task, and a new service per job.",
                )
            shares = bool(hello.host) and hello.host == self._host
            outbox = self._streams[worker] = Outbox(shares)
            self._memories[worker] = WorkerMemory()
            welcome = pb.Welcome(
                job_seed=self._seed, window_runs=WINDOW_RUNS, host=self._host if shares else ""
            )
            outbox.put(wire.encode(pb.ToWorker(welcome=welcome)))
            self._catch_up(worker)
            self._on_event(f"worker {worker} joined ({len(self._streams)} of {hello.num_workers})")
            return outbox

    def handle(self, worker: int, data: bytes) -> None:
        """Acts on one message of a worker.

        Raises:
            Refused: If it is no message that a correct worker would send.
        """
        try:
            header, payload = wire.decode(pb.ToAggregator, data)
            body = header.WhichOneof("body")
            if body == "contribution":
                self._contribute(worker, header.contribution, payload)
            else:
                with self._lock:
                    if worker not in self._streams:
                        # It was lost while this was on its way.
                        return
                    handler = getattr(self, f"_on_{body}", None)
                    if handler is None:
                        there = f"Received: {body} from worker {worker}."
                        raise invalid(f"Expected Hello once. {there}")
                    handler(worker, getattr(header, body), payload, data)
            self._publish()
        except (wire.WireError, RoundError) as e:
            raise invalid(str(e)) from e

    def lost(self, worker: int, why: str) -> None:
        """Takes note that a worker's stream is gone, orderly or not."""
        with self._lock:
            outbox = self._streams.pop(worker, None)
            if outbox is None:
                return
            outbox.close()
            self._memories.pop(worker)
            self._turned.notify_all()
            self._relay.drop(worker)
            if worker in self._present:
                text = f"worker {worker} is gone ({why}); going on without it"
                self._on_event(text)
                self._leave(worker)
                self._streams.tell_all(pb.ToWorker(notice=pb.Notice(text=text)))
            if not self._present and not self._streams:
                self.done.set()
        self._publish()

    def tick(self) -> None:
        """Lets time pass: asks the cutoff policy again and says for whom a round waits."""
        with self._lock:
            if self._hello is None:
                return
            now = self._clock()
            self._close(self._rounds.tick(now))
            self._close_gathers(now)
            self._say_who_is_missing(now)
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
            self._rounds = Rounds(
                hello.num_workers, policy, hello.history_rounds, hello.history_bytes
            )
        except ValueError as e:
            raise invalid(str(e)) from e
        if hello.deterministic and self._rounds.replicas_to_aggregate != hello.num_workers:
            raise invalid(
                "Expected a policy that waits for all workers, because sums are to be made in "
                f"their order. Received: cutoff={hello.cutoff}."
            )
        memory = ResultMemory(self._streams.tell_sharers, self._on_event)
        self._memory = memory
        self._delivery = Delivery(self._streams, self._rounds, memory, hello.deterministic)
        self._gathers = Gathers(hello.num_workers, policy, self._rounds.begun)
        self._endings = Endings(
            hello.num_workers, self._rounds.replicas_to_aggregate, self._rounds.begun
        )
        self._relay = StateRelay(
            hello.num_workers, self._streams, self._rounds.position, self._on_event
        )
        self._withheld = Withheld(self._rounds, self._streams, hello.shard == 0)
        self._present = set(range(hello.num_workers))
        self._gathered: dict[GatherKey, np.ndarray] = {}
        self._gather_results: dict[GatherKey, bytes] = {}
        self._waiting_since: dict[str, float] = {}
        self._hello = hello

    def _catch_up(self, worker: int) -> None:
        """Tells a worker that comes late what the others have been told and it may wait for."""
        tell = self._streams.tell
        if self._over_at is not None:
            tell(worker, self._job_over())
        for fit in self._stops:
            tell(worker, self._stop_at(fit))
        if self._endings.end is not None:
            tell(worker, _end_of_data(self._endings.end))
        for asked in self._endings.asked(worker):
            tell(worker, _end_proposal(asked.input_pass, asked.run))
        for message in self._gather_results.values():
            self._streams[worker].put(message)
        for segment in self._memory.offers() if self._streams[worker].opened is not None else ():
            tell(worker, pb.ToWorker(segment=segment))

    # Messages.

    def _contribute(self, worker: int, message: pb.Contribution, payload: memoryview) -> None:
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
                and worker in self._streams
                and self._rounds.is_open(worker, key, spec)
                and not self._delivery.is_turn(worker, key)
            ):
                self._turned.wait(1.0)
            if worker not in self._streams:
                return
            self._delivery.check(key, message, worker)
            receipt = self._rounds.contribute(worker, key, spec, self._clock())
            slot = None
            if receipt.verdict is Verdict.ADD:
                slot = self._delivery.claim(key, message)
            self._decide_end()
            self._close(receipt.closed)
            if self._gathers.waiting:
                self._close_gathers(self._clock())
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
        self._withheld.ask(self._present)

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
        self._close_gathers(self._clock())

    def _on_run_finished(self, worker: int, message: pb.RunFinished, *_: object) -> None:
        try:
            fate = Fate(message.fate)
        except ValueError as e:
            raise invalid(f"Expected a fate. Received: fate={message.fate}.") from e
        progress = self._rounds.finish(worker, message.run, message.exchanges, fate)
        self._rounds.counts[worker].nonfinite += message.nonfinite > 0
        self._delivery.progress(worker, progress)
        for voter in self._endings.voters(message.run):
            self._tell_unsaid(voter, message.run)
        self._endings.forget(self._rounds.runs_over)
        self._decide_end()
        for key in self._gathers.forget(self._present):
            self._gather_results.pop(key, None)
        self._close_gathers(self._clock())

    def _on_gather(self, worker: int, message: pb.Gather, payload: memoryview, data: bytes) -> None:
        if payload.nbytes % 8 or not message.kind:
            raise invalid(
                "Expected float64 values and what they are gathered for. Received: "
                f"{payload.nbytes} bytes, kind={message.kind}, from worker {worker}."
            )
        if message.run > self._rounds.begun(worker):
            raise invalid(
                f"Expected a gather after at most {self._rounds.begun(worker)} run(s), which "
                f"worker {worker} has begun. Received: run={message.run}."
            )
        values = np.frombuffer(payload, "<f8")
        key = GatherKey(message.kind, message.serial)
        part = Part(message.run, message.layout, values.size, tuple(message.hashes), message.stop)
        now = self._clock()
        if self._gathers.contribute(worker, key, part, now):
            total = self._gathered.setdefault(key, np.zeros(values.size))
            sums.add(total, None, values)
        self._close_gathers(now)

    def _on_stop_wish(self, worker: int, message: pb.StopWish, *_: object) -> None:
        if message.fit in self._stops or worker not in self._present or self._hello.shard:
            return
        self._stops[message.fit] = (self._rounds.end(message.run), worker)
        stop, _ = self._stops[message.fit]
        self._on_event(f"worker {worker} stops training {message.fit} after {stop} run(s)")
        # Nothing is closed yet in the last run before the stop, and what is closed later stands
        # behind this in every outbox. So nobody can finish that run without knowing of the stop.
        self._streams.tell_all(self._stop_at(message.fit))

    def _on_end_vote(self, worker: int, message: pb.EndVote, *_: object) -> None:
        self._enter_pass(message.input_pass)
        if not self._endings.vote(worker, message.input_pass, message.run, message.is_length):
            # Whoever is in a newer pass has not been in this run, unless it is over.
            if message.run >= self._rounds.runs_over and not self._hello.shard:
                self._streams.tell(worker, _end_of_data(Ended(message.input_pass, message.run)))
            return
        closed = self._rounds.abstain(worker, message.run, self._clock())
        self._tell_unsaid(worker, message.run)
        end = self._endings.end
        if end is not None:
            self._streams.tell(worker, _end_of_data(end))
        self._decide_end()
        self._close(closed)

    def _on_enter_pass(self, worker: int, message: pb.EnterPass, *_: object) -> None:
        self._enter_pass(message.input_pass)

    def _on_manifest(self, worker: int, message: pb.Manifest, *_: object) -> None:
        self._relay.manifest(worker, message)

    def _on_state_chunk(
        self, worker: int, message: pb.StateChunk, payload: memoryview, data: bytes
    ) -> None:
        self._relay.chunk(worker, message, payload)

    def _on_state_request(self, worker: int, message: pb.StateRequest, *_: object) -> None:
        # A giver can answer between two runs only, so no round may wait for the receiver.
        self._close(self._rounds.suspend(worker, self._clock()))
        if not self._hello.shard:
            named = message.HasField("giver")
            self._relay.ask(worker, message.giver if named else None, level_will_do=named)

    def _on_goodbye(self, worker: int, message: pb.Goodbye, *_: object) -> None:
        if message.reason not in pb.Leave.values():
            raise invalid(
                f"Expected a reason to leave. Received: reason={message.reason} from worker "
                f"{worker}."
            )
        reason = pb.Leave.Name(message.reason).lower()
        self._on_event(f"worker {worker} left after {message.run} run(s): {reason}")
        # A program that ends before its first run says nothing about how long the job is. The
        # first shard has a part of every exchange, so it decides alone.
        if message.reason == pb.FINISHED and message.run and not self._hello.shard:
            end = (self._rounds.end(message.run), worker)
            self._over_at = min(end, self._over_at or end)
            self._streams.tell_all(self._job_over())
        self._leave(worker)

    # Consequences.

    def _leave(self, worker: int) -> None:
        self._present.discard(worker)
        self._gathers.leave(worker)
        self._endings.leave(worker)
        self._delivery.leave(worker)
        closed = self._rounds.leave(worker, self._clock())
        self._decide_end()
        self._close(closed)
        self._close_gathers(self._clock())
        self._relay.leave(worker)
        if not self._present:
            self._streams.tell_all(pb.ToWorker(all_gone=pb.AllGone()))
            if not self._streams:
                self.done.set()

    def _decide_end(self) -> None:
        """Decides where an input pass ends; to be called before results are sent.

        So whoever finishes the last run of the pass has been told before. The first shard has a
        part of every exchange, so it decides alone.
        """
        if self._hello.shard:
            return
        for decision in self._endings.decide(self._rounds.runs_over, self._delivery.closed):
            if isinstance(decision, Ended):
                self._on_event(f"input pass {decision.input_pass} ends at run {decision.run}")
                self._streams.tell_all(_end_of_data(decision))
                continue
            for worker in decision.workers:
                self._streams.tell(worker, _end_proposal(decision.input_pass, decision.run))

    def _enter_pass(self, input_pass: int) -> None:
        ended = self._endings.enter(input_pass)
        if ended is None:
            return
        self._rounds.forget_abstentions()
        # Another shard may hear of the new pass before it hears that the last runs are over.
        for worker, end in ended.items() if not self._hello.shard else ():
            self._streams.tell(worker, _end_of_data(end))

    def _tell_unsaid(self, worker: int, run: int) -> None:
        """Tells a worker that a run is over of which others are not told yet.

        A run without exchange is not said to be over while workers could compute it; who has no
        input for it cannot, and might be the one that the next exchange waits for.
        """
        if self._rounds.runs_announced <= run < self._rounds.runs_over:
            over = pb.RunOver(run=run, exchanges=0, sent=True)
            self._streams.tell(worker, pb.ToWorker(run_over=over))

    def _close_gathers(self, now: float) -> None:
        for gather in self._gathers.close(now):
            result = pb.GatherResult(
                kind=gather.key.kind,
                serial=gather.key.serial,
                run=gather.run,
                contributors=gather.contributors,
                reference=gather.reference,
                hashes=gather.hashes,
                stop=gather.stop,
            )
            total = memoryview(self._gathered.pop(gather.key)).cast("B")
            message = wire.encode(pb.ToWorker(gather_result=result), total)
            self._gather_results[gather.key] = message
            for outbox in self._streams.values():
                outbox.put(message)

    def _job_over(self) -> pb.ToWorker:
        run, worker = self._over_at
        return pb.ToWorker(job_over=pb.JobOver(run=run, worker=worker))

    def _stop_at(self, fit: int) -> pb.ToWorker:
        run, worker = self._stops[fit]
        return pb.ToWorker(stop_at=pb.StopAt(fit=fit, run=run, worker=worker))

    def _say_who_is_missing(self, now: float) -> None:
        waits = {}
        run = self._rounds.runs_over
        missing, count = self._rounds.missing(run), self._rounds.arrived(run)
        if missing and count:
            waits[f"round {run}: {count} of {self._rounds.replicas_to_aggregate} contributions"] = (
                missing
            )
        for run, absent in self._relay.waiting_for().items():
            waits[f"the variables before run {run}"] = absent
        self._waiting_since = {w: self._waiting_since.get(w, now) for w in waits}
        for what, workers in waits.items():
            waited = now - self._waiting_since[what]
            if waited >= _NOTICE_SECONDS and waited % _NOTICE_SECONDS < 1:
                names = ", ".join(f"worker {w}" for w in workers)
                text = f"{what} after {waited:.0f} s; waiting for {names}"
                self._streams.tell_all(pb.ToWorker(notice=pb.Notice(text=text)))


def _end_of_data(end: Ended) -> pb.ToWorker:
    return pb.ToWorker(end_of_data=pb.EndOfData(input_pass=end.input_pass, run=end.run))


def _end_proposal(input_pass: int, run: int) -> pb.ToWorker:
    return pb.ToWorker(end_proposal=pb.EndProposal(input_pass=input_pass, run=run))
