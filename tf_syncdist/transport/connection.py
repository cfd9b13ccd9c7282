"""One worker's stream to one shard."""

import collections
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grpc

from tf_syncdist.errors import AggregatorUnreachableError, ServiceError
from tf_syncdist.observability.timeline import Timeline
from tf_syncdist.propagation.queue import CreditQueue, Urgency
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials, last_error
from tf_syncdist.transport.limiter import Limiter

# What is sent: a message, or what makes it when it is its turn; `None` sends nothing.
Outgoing = bytes | Callable[[], bytes | None]


class SliceMessage(NamedTuple):
    """A slice that is to be sent.

    Args:
        make: Makes the message when it is its turn; `None` if nobody wants it any more.
        urgency: When it leaves; the smallest first.
        nbytes: Size of its values.
        name: For the timeline.
    """

    make: Callable[[], bytes | None]
    urgency: Urgency
    nbytes: int
    name: str

    def __call__(self) -> bytes | None:
        return self.make()


class Made(NamedTuple):
    """Makes a message that there is already.

    Args:
        data: The message.
    """

    data: bytes

    def __call__(self) -> bytes:
        return self.data


_LOOK = object()

OnMessage = Callable[[pb.ToWorker, memoryview], None]


class Connection:
    """Sends messages in order and hands over what comes back.

    Making it waits until the service can be reached; nothing is said before `start`.

    Args:
        address: "host:port" of the shard.
        on_message: Called on the stream's own thread with every message.
        on_error: Called once, on that thread, if the stream ends otherwise than by `close`; with
            the connection, what happened, and gRPC's code if it is an error of gRPC's.
        timeout_seconds: How long to wait for the service.
        credentials: What is shown to the service, and demanded of it.
        credit_bytes: How many bytes of slices may be on their way, if they are sent by urgency.
        limiters: Of what is sent and of what is received, if there are any.
        timeline: Where slices are recorded that are sent.

    Attributes:
        reading_since: Since when the message was awaited that has just come.

    Raises:
        AggregatorUnreachableError: If nothing answers in time.
        CredentialsError: If the credentials cannot be used.
    """

    def __init__(
        self,
        address: str,
        on_message: OnMessage,
        on_error: Callable[["Connection", ServiceError, grpc.StatusCode | None], None],
        timeout_seconds: float = 30.0,
        credentials: Credentials = NO_CREDENTIALS,
        credit_bytes: int = 0,
        limiters: tuple[Limiter, Limiter] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.address = address
        self._on_message = on_message
        self._on_error = on_error
        self._closed = False
        # `None` says that nothing more comes, `_LOOK` that there is something in the background.
        self._outgoing: queue.SimpleQueue[Outgoing | None | object] = queue.SimpleQueue()
        self._background: collections.deque[Outgoing] = collections.deque()
        self._sends, self._receives = limiters or (Limiter(0.0), Limiter(0.0))
        self._lock = threading.Lock()
        self._slices: CreditQueue[SliceMessage] = CreditQueue(credit_bytes)
        self._timeline = timeline
        self.reading_since = 0.0
        self._reader: threading.Thread | None = None
        self._channel = credentials.channel(address)
        try:
            grpc.channel_ready_future(self._channel).result(timeout_seconds)
        except grpc.FutureTimeoutError:
            why = last_error(self._channel) or "no answer"
            self._channel.close()
            raise AggregatorUnreachableError(
                f"Expected an aggregation service at {address} within {timeout_seconds:g} s. "
                f"Received: {why}. Check that the `ps` task (or worker 0, where the cluster has "
                "no `ps`) runs, that TF_CONFIG names this address on every task, that no "
                "firewall stands between, and that all tasks are given the same TLS options."
            ) from None
        except BaseException:
            # Ctrl-C or SIGTERM, in a program that may go on.
            self._channel.close()
            raise

    def start(self, first: Outgoing) -> None:
        """Opens the stream with its first message."""
        self.send(first)
        self._call = self._channel.stream_stream(wire.TRAIN)(self._messages())
        self._reader = threading.Thread(
            target=self._read, name=f"tf_syncdist_{self.address}", daemon=True
        )
        self._reader.start()

    def send(self, message: Outgoing, in_background: bool = False) -> None:
        """Queues a message; never blocks.

        Args:
            message: What is sent.
            in_background: Whether to send it only when nothing else is to be sent. Such messages
                stay in order among themselves.
        """
        if in_background:
            self._background.append(message)
            message = _LOOK
        self._outgoing.put(message)

    def send_slice(self, message: SliceMessage) -> None:
        """Queues a slice, which leaves by its urgency and as the credit allows; never blocks.

        Everything that is no slice leaves before.
        """
        with self._lock:
            self._slices.put(message.urgency, message.nbytes, message)
        self._outgoing.put(_LOOK)

    def acknowledge(self, nbytes: int) -> None:
        """Takes note that slices have arrived."""
        with self._lock:
            self._slices.acknowledge(nbytes)
        self._outgoing.put(_LOOK)

    def report(self, timeout_seconds: float = 10.0) -> pb.ReportReply:
        """Asks for the job's counters."""
        call = self._channel.unary_unary(
            wire.REPORT, pb.ReportRequest.SerializeToString, pb.ReportReply.FromString
        )
        try:
            return call(pb.ReportRequest(), timeout=timeout_seconds)
        except grpc.RpcError as e:
            raise service_error(self.address, e) from None

    def abandon(self) -> None:
        """Ends the stream as if it had broken."""
        if self._reader is not None:
            self._call.cancel()

    def close(self, flush_seconds: float = 2.0) -> None:
        """Ends the stream after what is queued has been sent. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._outgoing.put(None)
        if self._reader is not None:
            if threading.current_thread() is not self._reader:
                self._reader.join(flush_seconds)
            self._call.cancel()
        self._channel.close()

    def _messages(self) -> Iterator[bytes]:
        while (message := self._next()) is not None:
            data = message if isinstance(message, bytes) else message()
            began = time.monotonic()
            if data is not None:
                self._sends.take(len(data))
                yield data
                if self._timeline is not None and isinstance(message, SliceMessage):
                    _record(self._timeline, message, began)
            # What is sent may be large, and the next message may be long in coming.
            del message, data

    def _next(self) -> Outgoing | None:
        """Waits for the next message; returns `None` when all has been sent."""
        while True:
            with self._lock:
                idle = not self._background and not self._slices.is_ready
            try:
                message = self._outgoing.get(block=idle, timeout=60.0)
            except queue.Empty:
                message = _LOOK
            if message is not _LOOK:
                if message is None and self._background:
                    self._outgoing.put(None)
                    return self._background.popleft()
                return message
            found = self._next_slice()
            if found is not None:
                return found
            if self._background and self._outgoing.empty():
                return self._background.popleft()

    def _next_slice(self) -> SliceMessage | None:
        """Returns the most urgent slice that somebody wants, if nothing else is to be sent."""
        while True:
            with self._lock:
                # Seen with the slices, for a slice of the next run comes after this run's end.
                if not self._outgoing.empty() or not self._slices.is_ready:
                    return None
                message, nbytes = self._slices.take()
            data = message()
            if data is not None:
                return message._replace(make=Made(data))
            with self._lock:
                self._slices.acknowledge(nbytes)

    def _read(self) -> None:
        code: grpc.StatusCode | None = grpc.StatusCode.OK
        try:
            self.reading_since = time.monotonic()
            for data in self._call:
                self._receives.take(len(data))
                self._on_message(*wire.decode(pb.ToWorker, data))
                self.reading_since = time.monotonic()
            error = ServiceError(
                f"Expected the aggregation service at {self.address} to stay until the end of the "
                "job. Received: the end of its stream."
            )
        except grpc.RpcError as e:
            code = e.code()
            error = service_error(self.address, e)
        except Exception as e:  # noqa: BLE001 - this thread's errors belong to the training thread
            code = None
            error = ServiceError(f"{type(e).__name__} while reading from {self.address}: {e}")
        if not self._closed:
            self._on_error(self, error, code)


def _record(timeline: Timeline, message: SliceMessage, began: float) -> None:
    run, exchange, priority = message.urgency
    args = {"run": run, "exchange": exchange, "priority": priority, "bytes": message.nbytes}
    timeline.record(message.name, "push", began, time.monotonic(), args=args)


def service_error(address: str, error: grpc.RpcError) -> ServiceError:
    """Returns what gRPC says in this package's words."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = error.details() if hasattr(error, "details") else str(error)
    if code == grpc.StatusCode.UNAVAILABLE:
        return ServiceError(
            f"The aggregation service at {address} went away ({details}). Without a `ps` task it "
            "lives and dies with worker 0; look at that task's log."
        )
    return ServiceError(f"The aggregation service at {address} refused: {code.name}: {details}")
