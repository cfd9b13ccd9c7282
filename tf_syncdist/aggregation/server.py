"""The gRPC server around a job."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator

import grpc

from tf_syncdist.aggregation.admission import MAX_WORKERS
from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.outbox import Outbox, Refused
from tf_syncdist.cluster.addresses import is_loopback
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# Every stream holds one thread of the pool while it is open; the rest answers reports.
_THREADS = MAX_WORKERS + 24

_TICK_SECONDS = 0.2


class AggregatorServer:
    """Serves one job until its workers are gone.

    Args:
        host: Address to listen on. Loopback addresses are served as they are.
        port: Port to listen on; 0 picks a free one, which `.port` tells.
        insecure: Allows an address beyond loopback, where anybody who can reach the port can
            take part in the job. Set it only on a network that you trust.
        on_event: Called with one line for the service's log.

    Raises:
        ValueError: If `host` is not loopback and `insecure` is not set.
        OSError: If the port cannot be had.

    Example:

    >>> with AggregatorServer(port=0) as server:
    ...     address = f"127.0.0.1:{server.port}"
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        insecure: bool = False,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        if not insecure and not is_loopback(host):
            raise ValueError(
                "Expected a loopback address, because without TLS anybody who reaches the port "
                f"could take part in the job. Received: host={host!r}. Use 127.0.0.1, or give "
                "--insecure (insecure=True) on a network that you trust."
            )
        self.job = Job(on_event=on_event)
        self._stopped = threading.Event()
        self._server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(_THREADS, "tf_syncdist_stream"),
            options=(*wire.CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)),
        )
        handlers = {
            "Train": grpc.stream_stream_rpc_method_handler(self._train),
            "Report": grpc.unary_unary_rpc_method_handler(
                lambda request, context: self.job.report(),
                pb.ReportRequest.FromString,
                pb.ReportReply.SerializeToString,
            ),
            "Beat": grpc.unary_unary_rpc_method_handler(
                lambda request, context: pb.BeatReply(
                    next_seconds=self.job.beat(request.worker, request.incarnation)
                ),
                pb.BeatRequest.FromString,
                pb.BeatReply.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE, handlers),)
        )
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(target)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise OSError(f"Expected a free port. Received: {target}, which cannot be bound.")
        self._server.start()
        self._ticker = threading.Thread(target=self._tick, name="tf_syncdist_tick", daemon=True)
        self._ticker.start()

    def __enter__(self) -> "AggregatorServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, timeout_seconds: float) -> bool:
        """Waits until every worker is gone and returns whether that happened in time."""
        return self.job.done.wait(timeout_seconds)

    def close(self, grace_seconds: float = 0.5) -> None:
        """Stops serving. May be called twice."""
        if not self._stopped.is_set():
            self._stopped.set()
            # Streams break one after the other, which must not close rounds.
            self.job.freeze()
            self._server.stop(grace_seconds).wait(grace_seconds + 5)
            self._ticker.join(5)

    def _tick(self) -> None:
        while not self._stopped.wait(_TICK_SECONDS):
            self.job.tick()

    def _train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            worker, outbox = self._join(requests)
        except Refused as e:
            context.abort(e.code, e.details)
        reader = threading.Thread(
            target=self._read,
            args=(worker, outbox, requests),
            name=f"tf_syncdist_reader_{worker}",
            daemon=True,
        )
        context.add_callback(lambda: self.job.lost(worker, "its connection broke", outbox))
        reader.start()
        try:
            yield from outbox.drain()
        except Refused as e:
            context.abort(e.code, e.details)

    def _join(self, requests: Iterator[bytes]) -> tuple[int, Outbox]:
        try:
            header, _ = wire.decode(pb.ToAggregator, next(requests))
            if header.WhichOneof("body") != "hello":
                raise wire.WireError("Expected Hello as the first message of a stream.")
        except (wire.WireError, StopIteration) as e:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(e) or "Expected Hello.") from e
        return header.hello.worker, self.job.join(header.hello)

    def _read(self, worker: int, outbox: Outbox, requests: Iterator[bytes]) -> None:
        try:
            for data in requests:
                self.job.handle(worker, data, outbox)
        except Refused as e:
            outbox.close(e)
            self.job.lost(worker, "it sent what the service refuses", outbox)
        except Exception as e:  # noqa: BLE001 - gRPC raises a bare Exception when a stream breaks
            outbox.close()
            self.job.lost(worker, f"its connection broke: {type(e).__name__}", outbox)
        else:
            outbox.close()
            self.job.lost(worker, "its connection was closed", outbox)
