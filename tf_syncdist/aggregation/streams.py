"""One worker's stream on the service's side: one thread reads, another one sends."""

import logging
import queue
import threading
import time
from collections.abc import Iterator

import grpc

from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.limits import Limits, Waiting
from tf_syncdist.aggregation.outbox import Outbox, Refused
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.guards import Refusals

# Not counted: gRPC does not tell a client that has gone away from one that has sent nothing.
_SAID_NOTHING = "stream without a message"
NOT_OURS = "worker that is not of this job"

_log = logging.getLogger("tf_syncdist")


class TrainStream:
    """A stream from its first message to its end.

    A thread of its own reads, the one that gRPC calls sends. So neither waits for ever for a
    client that says nothing, or reads nothing.

    Args:
        job: The job.
        requests: What the client sends.
        context: gRPC's side of the stream.
        refusals: Counts what is refused.
        limits: What is allowed.
        waiting: Counts the streams without `Hello`.
    """

    def __init__(
        self,
        job: Job,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        refusals: Refusals,
        limits: Limits,
        waiting: Waiting,
    ) -> None:
        self._job = job
        self._requests = requests
        self._context = context
        self._refusals = refusals
        self._limits = limits
        self._waiting = waiting
        self._admitted: queue.SimpleQueue[Outbox | Refused] = queue.SimpleQueue()
        self._outbox: Outbox | None = None
        self._leaving_since: float | None = None
        self._lock = threading.Lock()
        self._counted = False
        # Told to the others if the stream ends; gRPC may tell of that before the reason is known.
        self._why = "its connection broke"

    def serve(self) -> Iterator[bytes]:
        """Yields what the worker is to be told; to be called by gRPC's thread."""
        peer = self._context.peer()
        try:
            self._waiting.enter(peer)
            try:
                outbox = self._wait_for_hello()
            finally:
                self._waiting.leave(peer)
            yield from outbox.drain()
        except Refused as e:
            self._count(e)
            self._context.abort(e.code, e.details)

    def tick(self, now: float) -> None:
        """Breaks the stream if its end is not read by the client, which would hold a thread."""
        if self._outbox is None or not self._outbox.is_closed:
            return
        if self._leaving_since is None:
            self._leaving_since = now
        elif now - self._leaving_since > self._limits.leaving_seconds:
            self._context.cancel()

    def _wait_for_hello(self) -> Outbox:
        threading.Thread(target=self._read, name="tf_syncdist_reader", daemon=True).start()
        try:
            admitted = self._admitted.get(timeout=self._limits.hello_seconds)
        except queue.Empty:
            raise Refused(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"Expected Hello within {self._limits.hello_seconds:g} s from the begin of a "
                "stream. Received: nothing.",
            ) from None
        if isinstance(admitted, Refused):
            raise admitted
        return admitted

    def _read(self) -> None:
        worker = None
        try:
            data, _ = self._next()
            if data is None:
                invalid = grpc.StatusCode.INVALID_ARGUMENT
                raise Refused(invalid, "Expected Hello.", _SAID_NOTHING)
            worker = self._join(data)
            while True:
                data, broke = self._next()
                if data is None:
                    self._why = broke or "its connection was closed"
                    break
                self._job.handle(worker, data, self._outbox)
                # It may be large, and the next one may be long in coming.
                del data
            self._outbox.close()
        except Refused as e:
            self._why = "it sent what the service refuses"
            self._end(e)
        except Exception as e:  # noqa: BLE001 - the worker must not take it for an orderly end
            _log.exception("while handling what a worker sent")
            self._why = f"the service failed on what it sent: {type(e).__name__}"
            self._end(
                Refused(
                    grpc.StatusCode.INTERNAL,
                    "Expected the service to handle what it is sent. Received: "
                    f"{type(e).__name__}: {e}. This is an error of tf_syncdist; the service's log "
                    "has more.",
                )
            )
        if worker is not None:
            self._job.lost(worker, self._why, self._outbox)

    def _next(self) -> tuple[bytes | None, str]:
        """Returns the next message, or `None` and how the stream broke, if it did."""
        try:
            return next(self._requests), ""
        except StopIteration:
            return None, ""
        except Exception as e:  # noqa: BLE001 - gRPC raises a bare Exception when a stream breaks
            return None, f"its connection broke: {type(e).__name__}"

    def _join(self, data: bytes) -> int:
        try:
            header, _ = wire.decode(pb.ToAggregator, data)
        except wire.WireError as e:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(e)) from e
        if header.WhichOneof("body") != "hello":
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, "Expected Hello as the first message of a stream."
            )
        worker = header.hello.worker
        try:
            outbox = self._job.join(header.hello)
        except Refused as e:
            if e.code is grpc.StatusCode.INVALID_ARGUMENT:
                e.reason = NOT_OURS
            raise
        outbox.on_overflow = self._overflow
        self._outbox = outbox
        # If the stream has ended meanwhile, gRPC does not call back any more.
        if not self._context.add_callback(lambda: self._job.lost(worker, self._why, outbox)):
            self._job.lost(worker, self._why, outbox)
        self._admitted.put(outbox)
        return worker

    def _end(self, refusal: Refused) -> None:
        if self._outbox is not None:
            self._outbox.close(refusal)
        else:
            self._admitted.put(refusal)

    def _overflow(self, refusal: Refused) -> None:
        # The thread that sends is most likely stuck in a message that the worker does not read.
        self._count(refusal)
        self._context.cancel()

    def _count(self, refusal: Refused) -> None:
        """Counts a refusal once, whichever thread comes to know of it first."""
        with self._lock:
            if self._counted or refusal.reason == _SAID_NOTHING:
                return
            self._counted = True
        self._refusals.add(refusal.reason, refusal.details)


class Streams:
    """The streams that are open, to break those that are over and stuck."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: set[TrainStream] = set()

    def serve(self, stream: TrainStream) -> Iterator[bytes]:
        """Yields what the stream's worker is to be told."""
        with self._lock:
            self._streams.add(stream)
        try:
            yield from stream.serve()
        finally:
            with self._lock:
                self._streams.discard(stream)

    def tick(self) -> None:
        """Lets time pass."""
        with self._lock:
            streams = list(self._streams)
        now = time.monotonic()
        for stream in streams:
            stream.tick(now)
