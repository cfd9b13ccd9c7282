"""One job on one shard: the pure machines, the sums, and the workers' outboxes behind one lock."""

import random
import threading
import time
from collections.abc import Callable

import grpc
import numpy as np

from tf_syncdist import cutoff
from tf_syncdist.aggregation import sums
from tf_syncdist.aggregation.epochs import Epochs
from tf_syncdist.aggregation.manifests import Variable
from tf_syncdist.aggregation.outbox import Outbox, Refused
from tf_syncdist.aggregation.rounds import (
    Closed,
    Fate,
    RoundError,
    Rounds,
    RunOver,
    SliceKey,
    SliceSpec,
    Verdict,
)
from tf_syncdist.aggregation.states import States
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# Results travel to a worker up to this many runs ahead of it, so that a replay finds the next
# result there already, while a worker that is stuck does not pile up the job's history.
WINDOW_RUNS = 4

# Every worker's stream holds a thread of the server.
MAX_WORKERS = 1000

_NOTICE_SECONDS = 10.0

# A job that has begun is over when no worker has been connected for this long.
_ALONE_SECONDS = 60.0
_SAME_FOR_ALL = ("num_workers", "cutoff", "num_shards", "shard", "history_rounds", "history_bytes")


def _invalid(details: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, details)


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
        self._hello: pb.Hello | None = None
        self._seed = random.SystemRandom().getrandbits(63)
        self._streams: dict[int, Outbox] = {}
        self._present: set[int] = set()
        self._alone_since: float | None = None
        self._over_at: tuple[int, int] | None = None

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
            self._check_hello(hello)
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
            outbox = self._streams[worker] = Outbox()
            welcome = pb.Welcome(job_seed=self._seed, window_runs=WINDOW_RUNS)
            outbox.put(wire.encode(pb.ToWorker(welcome=welcome)))
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
            with self._lock:
                handler = getattr(self, f"_on_{body}", None)
                if handler is None:
                    raise _invalid(f"Expected Hello once. Received: {body} from worker {worker}.")
                handler(worker, getattr(header, body), payload, data)
        except (wire.WireError, RoundError) as e:
            raise _invalid(str(e)) from e

    def lost(self, worker: int, why: str) -> None:
        """Takes note that a worker's stream is gone, orderly or not."""
        with self._lock:
            outbox = self._streams.pop(worker, None)
            if outbox is None:
                return
            outbox.close()
            for receiver in self._states.drop(worker):
                try:
                    self._ask_for_state(receiver)
                except Refused as e:
                    self._streams[receiver].close(e)
            if worker in self._present:
                text = f"worker {worker} is gone ({why}); going on without it"
                self._on_event(text)
                self._leave(worker)
                self._tell_all(pb.ToWorker(notice=pb.Notice(text=text)))
            if not self._present and not self._streams:
                self.done.set()

    def tick(self) -> None:
        """Lets time pass: asks the cutoff policy again and says for whom a round waits."""
        with self._lock:
            if self._hello is None:
                return
            now = self._clock()
            self._close(self._rounds.tick(now))
            self._close_epochs(now)
            self._say_who_is_missing(now)
            # Workers that never came, or died before they could, must not keep the service.
            self._alone_since = None if self._streams else self._alone_since or now
            if self._alone_since is not None and now - self._alone_since > _ALONE_SECONDS:
                self.done.set()

    def report(self) -> pb.ReportReply:
        """Returns the counters of the job."""
        with self._lock:
            if self._hello is None:
                return pb.ReportReply()
            return pb.ReportReply(
                rounds=self._rounds.rounds,
                workers=[
                    pb.WorkerReport(
                        worker=index,
                        contributed=counts.fates[Fate.CONTRIBUTED],
                        late=counts.fates[Fate.LATE],
                        partly_used=counts.partly_used,
                        replayed=counts.replayed,
                        missed=counts.fates[Fate.MISSED],
                        mean_delay_seconds=counts.mean_delay_seconds,
                        delays=counts.delays,
                    )
                    for index, counts in enumerate(self._rounds.counts)
                ],
            )

    # Starting.

    def _check_hello(self, hello: pb.Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            raise _invalid(
                f"Expected version {wire.PROTOCOL} of the contract. Received: protocol="
                f"{hello.protocol} from worker {hello.worker}. Install the same tf_syncdist "
                "everywhere."
            )
        if not hello.worker < hello.num_workers <= MAX_WORKERS:
            raise _invalid(
                "Expected a worker index below the number of workers, and that to be at most "
                f"{MAX_WORKERS}. Received: worker={hello.worker}, num_workers={hello.num_workers}."
            )
        for name in _SAME_FOR_ALL if self._hello is not None else ():
            expected, received = getattr(self._hello, name), getattr(hello, name)
            if expected != received:
                raise _invalid(
                    f"Expected every worker to be given the same `{name}`: {expected!r}, as worker "
                    f"{self._hello.worker} said. Received: {name}={received!r} from worker "
                    f"{hello.worker}. Start every task with the same arguments and cluster."
                )

    def _start(self, hello: pb.Hello) -> None:
        try:
            policy = cutoff.deserialize(hello.cutoff)
            self._rounds = Rounds(
                hello.num_workers, policy, hello.history_rounds, hello.history_bytes
            )
        except ValueError as e:
            raise _invalid(str(e)) from e
        self._epochs = Epochs(hello.num_workers, policy, self._rounds.begun)
        self._states = States(hello.num_workers)
        self._present = set(range(hello.num_workers))
        self._totals: dict[SliceKey, np.ndarray] = {}
        self._specs: dict[SliceKey, pb.Contribution] = {}
        self._results: dict[int, list[bytes]] = {}
        self._epoch_totals: dict[int, np.ndarray] = {}
        self._waiting_since: dict[str, float] = {}
        self._hello = hello

    # Messages.

    def _on_contribution(
        self, worker: int, message: pb.Contribution, payload: memoryview, data: bytes
    ) -> None:
        dtype = sums.DTYPES.get(message.dtype)
        if dtype is None or message.elements * dtype.itemsize != payload.nbytes:
            raise _invalid(
                f"Expected {message.elements} value(s) of a known dtype. Received: "
                f"dtype={message.dtype}, {payload.nbytes} bytes for slice {message.slice} of run "
                f"{message.run} from worker {worker}."
            )
        key = SliceKey(message.run, message.exchange, message.slice)
        name = pb.DataType.Name(message.dtype).lower()
        spec = SliceSpec(message.num_slices, name, message.elements, message.layout)
        receipt = self._rounds.contribute(worker, key, spec, self._clock())
        if receipt.verdict is Verdict.ADD:
            values = np.frombuffer(payload, dtype)
            self._totals[key] = sums.add(self._totals.get(key), values)
            self._specs[key] = message
        self._close(receipt.closed)
        if self._epochs.waiting:
            self._close_epochs(self._clock())

    def _on_late(self, worker: int, message: pb.LateContribution, *_: object) -> None:
        self._rounds.late(worker, message.run, self._clock())
        self._close_epochs(self._clock())

    def _on_run_finished(self, worker: int, message: pb.RunFinished, *_: object) -> None:
        try:
            fate = Fate(message.fate)
        except ValueError as e:
            raise _invalid(f"Expected a fate. Received: fate={message.fate}.") from e
        progress = self._rounds.finish(worker, message.run, message.exchanges, fate)
        for over in progress.over:
            self._announce(over)
        for run in progress.evicted:
            self._results.pop(run, None)
        self._send_results(worker, self._rounds.position(worker) + WINDOW_RUNS - 1)
        for run in self._epochs.forget(self._present):
            self._epoch_totals.pop(run, None)
        self._close_epochs(self._clock())

    def _on_epoch(
        self, worker: int, message: pb.EpochContribution, payload: memoryview, data: bytes
    ) -> None:
        if payload.nbytes % 8:
            raise _invalid(f"Expected float64 values. Received: {payload.nbytes} bytes.")
        values = np.frombuffer(payload, "<f8")
        now = self._clock()
        if self._epochs.contribute(worker, message.run, message.layout, values.size, now):
            total = self._epoch_totals.get(message.run)
            self._epoch_totals[message.run] = sums.add(total, values)
        self._close_epochs(now)

    def _on_manifest(self, worker: int, message: pb.Manifest, *_: object) -> None:
        variables = [Variable(v.name, v.dtype, tuple(v.shape)) for v in message.variables]
        verdict, chunks = self._states.manifest(worker, message.run, variables)
        self._tell_verdict(message.run, verdict, chunks)

    def _on_state_chunk(
        self, worker: int, message: pb.StateChunk, payload: memoryview, data: bytes
    ) -> None:
        # The field numbers of a chunk differ between the two directions, so it is wrapped anew.
        relayed = wire.encode(pb.ToWorker(state_chunk=message), payload)
        last = (
            message.variable + 1 == message.num_variables
            and message.offset + payload.nbytes == message.total
        )
        if not message.request:
            if self._states.start_chunk(worker, message.run, relayed, last):
                self._relay(relayed)
            return
        receiver = self._states.chunk(worker, message.request, last)
        if receiver in self._streams:
            self._streams[receiver].put(relayed)

    def _on_state_request(self, worker: int, message: pb.StateRequest, *_: object) -> None:
        # A giver can answer between two runs only, so no round may wait for the receiver.
        self._close(self._rounds.suspend(worker, self._clock()))
        if not self._hello.shard:
            self._ask_for_state(worker)

    def _on_goodbye(self, worker: int, message: pb.Goodbye, *_: object) -> None:
        reason = pb.Leave.Name(message.reason).lower()
        self._on_event(f"worker {worker} left after {message.run} run(s): {reason}")
        # A program that ends before its first run says nothing about how long the job is. The
        # first shard has a part of every exchange, so it decides alone.
        if message.reason == pb.FINISHED and message.run and not self._hello.shard:
            end = (self._rounds.end(message.run), worker)
            self._over_at = min(end, self._over_at or end)
            over = pb.JobOver(run=self._over_at[0], worker=self._over_at[1])
            self._tell_all(pb.ToWorker(job_over=over))
        self._leave(worker)

    # Consequences.

    def _leave(self, worker: int) -> None:
        self._present.discard(worker)
        self._epochs.leave(worker)
        self._close(self._rounds.leave(worker, self._clock()))
        self._close_epochs(self._clock())
        for run, verdict, chunks in self._states.leave(worker):
            self._tell_verdict(run, verdict, chunks)
        if not self._present:
            self._tell_all(pb.ToWorker(all_gone=pb.AllGone()))
            if not self._streams:
                self.done.set()

    def _close(self, closed: tuple[Closed, ...]) -> None:
        for key, contributors, _ in closed:
            total = self._totals.pop(key)
            spec = self._specs.pop(key)
            total = sums.scale(total, len(contributors), self._rounds.replicas_to_aggregate)
            result = pb.Result(
                run=key.run,
                exchange=key.exchange,
                slice=key.slice,
                num_slices=spec.num_slices,
                contributors=contributors,
            )
            message = wire.encode(pb.ToWorker(result=result), memoryview(total).cast("B"))
            self._results.setdefault(key.run, []).append(message)
            for worker, outbox in self._streams.items():
                if key.run < self._rounds.position(worker) + WINDOW_RUNS:
                    outbox.put(message)

    def _close_epochs(self, now: float) -> None:
        for run, contributors in self._epochs.close(now):
            result = pb.EpochResult(run=run, contributors=contributors)
            total = memoryview(self._epoch_totals[run]).cast("B")
            message = wire.encode(pb.ToWorker(epoch_result=result), total)
            for outbox in self._streams.values():
                outbox.put(message)

    def _announce(self, over: RunOver) -> None:
        """Tells everybody that a run is over, and whose window has held it that all is sent."""
        both = [
            wire.encode(
                pb.ToWorker(run_over=pb.RunOver(run=over.run, exchanges=over.exchanges, sent=sent))
            )
            for sent in (False, True)
        ]
        for worker, outbox in self._streams.items():
            outbox.put(both[over.run < self._rounds.position(worker) + WINDOW_RUNS])

    def _send_results(self, worker: int, run: int) -> None:
        """Sends a run that has just come into a worker's window."""
        outbox = self._streams[worker]
        if run < self._rounds.kept_from:
            outbox.put(wire.encode(pb.ToWorker(history_gone=pb.HistoryGone(run=run))))
            return
        for message in self._results.get(run, ()):
            outbox.put(message)
        if run < self._rounds.runs_announced:
            exchanges = self._rounds.exchanges(run)
            over = pb.RunOver(run=run, exchanges=exchanges, sent=True)
            outbox.put(wire.encode(pb.ToWorker(run_over=over)))

    def _tell_verdict(self, run: int, verdict: str | None, chunks: list[bytes]) -> None:
        if verdict is None:
            return
        self._on_event(verdict or f"all workers train the same variables from run {run} on")
        verdict_message = pb.ManifestVerdict(run=run, error=verdict)
        self._tell_all(pb.ToWorker(manifest_verdict=verdict_message))
        for chunk in chunks if not verdict else ():
            self._relay(chunk)

    def _relay(self, message: bytes) -> None:
        for worker, outbox in self._streams.items():
            if worker != 0:
                outbox.put(message)

    def _ask_for_state(self, receiver: int) -> None:
        found = self._states.request(receiver, self._streams, self._rounds.position)
        if found is None:
            raise _invalid(
                f"Expected a connected worker that is further than worker {receiver}, to take over "
                "its state. Received: a request while there is none (any more)."
            )
        request, giver = found
        self._on_event(f"worker {giver} gives its state to worker {receiver}")
        self._streams[giver].put(wire.encode(pb.ToWorker(give_state=pb.GiveState(request=request))))

    def _say_who_is_missing(self, now: float) -> None:
        waits = {}
        run = self._rounds.runs_over
        missing = self._rounds.missing(run)
        if self._present and missing and len(missing) < len(self._present):
            count = len(self._present) - len(missing)
            waits[f"round {run}: {count} of {self._rounds.replicas_to_aggregate} contributions"] = (
                missing
            )
        for run, absent in self._states.waiting_for().items():
            waits[f"the variables before run {run}"] = absent
        self._waiting_since = {w: self._waiting_since.get(w, now) for w in waits}
        for what, workers in waits.items():
            waited = now - self._waiting_since[what]
            if waited >= _NOTICE_SECONDS and waited % _NOTICE_SECONDS < 1:
                names = ", ".join(f"worker {w}" for w in workers)
                text = f"{what} after {waited:.0f} s; waiting for {names}"
                self._tell_all(pb.ToWorker(notice=pb.Notice(text=text)))

    def _tell_all(self, message: pb.ToWorker) -> None:
        data = wire.encode(message)
        for outbox in self._streams.values():
            outbox.put(data)
