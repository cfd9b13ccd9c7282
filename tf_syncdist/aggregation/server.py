"""The gRPC server around a job."""

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError

from tf_syncdist.aggregation.admission import MAX_WORKERS
from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.limits import (
    DEFAULT_LIMITS,
    Limits,
    Waiting,
    default_worker_bytes,
)
from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.aggregation.streams import Streams, TrainStream
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials
from tf_syncdist.transport.guards import CallGuard, Refusals

# Every stream holds one thread of the pool while it is open; the rest answers reports and refuses.
_SPARE_THREADS = 24

_OPTIONS = (
    *wire.CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),
    # Connections on which nobody comes to say anything are closed: before TLS is agreed on, and
    # without any call. A worker's stream is a call.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
)

_METHODS = (wire.TRAIN, wire.REPORT, wire.BEAT)

_log = logging.getLogger("tf_syncdist")

_TICK_SECONDS = 0.2


class AggregatorServer:
    """Serves one job until its workers are gone.

    Args:
        host: Address to listen on. Loopback addresses are served as they are.
        port: Port to listen on; 0 picks a free one, which `.port` tells.
        credentials: TLS, the job's token, and whether an address beyond loopback may be served
            without TLS. By default neither TLS nor a token, and loopback only.
        on_event: Called with one line for the service's log.
        limits: What one worker may take of the service. Raise `worker_bytes` if a job is refused
            for it that the machine has the memory for.
        record_trace: File to which the first shard writes how long the workers take for each round;
            empty for none.

    Raises:
        CredentialsError: If the credentials cannot be used, or `host` is not loopback and there
            is neither TLS nor `credentials.insecure`.
        OSError: If the port cannot be had.

    Example:

    >>> with AggregatorServer(port=0) as server:
    ...     address = f"127.0.0.1:{server.port}"
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        credentials: Credentials = NO_CREDENTIALS,
        on_event: Callable[[str], None] = lambda text: None,
        limits: Limits = DEFAULT_LIMITS,
        record_trace: str = "",
    ) -> None:
        limits = limits._replace(worker_bytes=limits.worker_bytes or default_worker_bytes())
        self.job = Job(
            on_event=on_event, worker_bytes=limits.worker_bytes, record_trace=record_trace
        )
        # Something is to be done at once: by the clock's thread, or by nobody any more.
        self._alarm = threading.Event()
        self.job.on_alarm = self._alarm.set
        self._limits = limits
        self._refusals = Refusals(on_event)
        self._waiting = Waiting(limits)
        self._streams = Streams()
        self._stopped = threading.Event()
        threads = MAX_WORKERS + limits.waiting_streams + _SPARE_THREADS
        self._server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(threads, "tf_syncdist_stream"),
            interceptors=(CallGuard(credentials, _METHODS, self._refusals),),
            options=_OPTIONS,
            maximum_concurrent_rpcs=threads,
        )
        handlers = {
            "Train": grpc.stream_stream_rpc_method_handler(self._train),
            "Report": grpc.unary_unary_rpc_method_handler(
                self._report, response_serializer=pb.ReportReply.SerializeToString
            ),
            "Beat": grpc.unary_unary_rpc_method_handler(
                self._beat, response_serializer=pb.BeatReply.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE, handlers),)
        )
        self.port = credentials.add_port(self._server, host, port)
        self._server.start()
        self._ticker = threading.Thread(target=self._tick, name="tf_syncdist_tick", daemon=True)
        self._ticker.start()

    def __enter__(self) -> "AggregatorServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def refused(self) -> dict[str, int]:
        """How often a call, a stream or a message was refused, by the reason."""
        return self._refusals.counts()

    def wait(self, timeout_seconds: float) -> bool:
        """Waits until every worker is gone and returns whether that happened in time."""
        return self.job.done.wait(timeout_seconds)

    def close(self, grace_seconds: float = 0.5) -> None:
        """Stops serving. May be called twice."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._alarm.set()
            # Streams break one after the other, which must not close rounds.
            self.job.freeze()
            self._server.stop(grace_seconds).wait(grace_seconds + 5)
            self._ticker.join(5)
            self.job.close()

    def _tick(self) -> None:
        due_at = time.monotonic()
        while not self._stopped.is_set():
            try:
                left = max(0.0, due_at - time.monotonic())
                self._alarm.wait(self.job.seconds_to_sleep(left))
                self._alarm.clear()
                self.job.ring()
                if time.monotonic() >= due_at:
                    due_at = time.monotonic() + _TICK_SECONDS
                    self.job.tick()
                    self._streams.tick()
            except Exception:  # noqa: BLE001 - without this thread rounds would wait for ever
                _log.exception("in the service's clock")
                self._stopped.wait(_TICK_SECONDS)

    def _train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        stream = TrainStream(
            self.job, requests, context, self._refusals, self._limits, self._waiting
        )
        return self._streams.serve(stream)

    def _beat(self, request: bytes, context: grpc.ServicerContext) -> pb.BeatReply:
        try:
            beat = pb.BeatRequest.FromString(request)
        except DecodeError:
            self._refuse(context, f"Expected a BeatRequest. Received: {len(request)} other bytes.")
        return pb.BeatReply(next_seconds=self.job.beat(beat.worker, beat.incarnation))

    def _report(self, request: bytes, context: grpc.ServicerContext) -> pb.ReportReply:
        if request:
            self._refuse(
                context,
                f"Expected a ReportRequest, which is empty. Received: {len(request)} bytes.",
            )
        reply = self.job.report()
        reply.refused.update(self.refused)
        return reply

    def _refuse(self, context: grpc.ServicerContext, details: str) -> NoReturn:
        refused = Refused(grpc.StatusCode.INVALID_ARGUMENT, details)
        self._refusals.add(refused.reason, refused.details)
        context.abort(refused.code, refused.details)
