"""What the service has to say to the workers, to each of them in order."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

import grpc

from tf_syncdist.propagation.queue import IN_ORDER, CreditQueue, Urgency
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# gRPC sends no status whose text is longer than some thousand bytes.
_MOST_DETAILS = 1500

# Stands for "look whether a result may leave".
_LOOK = b""

# What a message takes besides its bytes, at least.
_MESSAGE_BYTES = 128


# What is counted as refused, where nothing better is known than the status.
_REASONS = {
    grpc.StatusCode.INVALID_ARGUMENT: "message that no correct worker sends",
    grpc.StatusCode.ALREADY_EXISTS: "worker that is there already",
    grpc.StatusCode.DEADLINE_EXCEEDED: "stream without Hello in time",
    grpc.StatusCode.INTERNAL: "message on which the service failed",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "too much of something",
}


class Refused(Exception):
    """A message that the service refuses; the stream ends with this status.

    Args:
        code: The status.
        details: What was expected and received.
        reason: As what it is counted; one of few. By default the status decides.
    """

    def __init__(self, code: grpc.StatusCode, details: str, reason: str = "") -> None:
        if len(details) > _MOST_DETAILS:
            half = _MOST_DETAILS // 2
            details = f"{details[:half]} [...] {details[-half:]}"
        # It may name what a worker has said, which need not be text that can be sent.
        details = details.encode(errors="backslashreplace").decode()
        super().__init__(details)
        self.code = code
        self.details = details
        self.reason = reason or _REASONS.get(code, code.name.lower())


class Outbox:
    """A queue of encoded messages that one stream drains.

    It holds references only: an aggregated slice is one buffer for all receivers. The rounds'
    window bounds how many results can stand in it, and `most_bytes` everything else, for a worker
    that does not read what it is sent.

    Args:
        shares: Whether the worker wants to share memory with the service.
        most_bytes: How many bytes may stand in it besides results; a stream for which there is
            more is refused.
        credit_bytes: If not 0, results leave by their urgency, and so many bytes of them may be on
            their way to the worker.

    Attributes:
        opened: The service's segments that the worker can read; `None` if it shares none.
        on_overflow: Called when there is more, if set. The stream may be stuck in a message that
            is not read, and will not look for the refusal.
    """

    def __init__(
        self, shares: bool = False, most_bytes: int = 2**62, credit_bytes: int = 0
    ) -> None:
        self.opened: set[int] | None = set() if shares else None
        self.on_overflow: Callable[[Refused], None] | None = None
        self._most_bytes = most_bytes
        # Each is written by one side only: the job, under its lock, and the stream.
        self._put_bytes = 0
        self._taken_bytes = 0
        # What each message counts for, in the same order.
        self._sizes: queue.SimpleQueue[int] = queue.SimpleQueue()
        # `None` says that nothing more comes, `_LOOK` that a result may leave.
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._refusal: Refused | None = None
        self._lock = threading.Lock()
        self._urgent: CreditQueue[bytes] | None = (
            CreditQueue(credit_bytes) if credit_bytes else None
        )

    @property
    def by_urgency(self) -> bool:
        """Whether results leave by their urgency, so that other messages overtake them."""
        return self._urgent is not None

    def put_result(self, message: bytes, urgency: Urgency, nbytes: int) -> None:
        """Appends a result, or what has to stand behind results.

        Args:
            message: The message.
            urgency: When it leaves, if results leave by urgency.
            nbytes: Size of the result's values.
        """
        if self._urgent is None or urgency.priority == IN_ORDER:
            self.put(message, is_result=True)
        elif not self._closed:
            with self._lock:
                self._urgent.put(urgency, nbytes, message)
            self._messages.put(_LOOK)

    def acknowledge(self, nbytes: int) -> None:
        """Takes note that results have arrived at the worker."""
        if self._urgent is not None:
            with self._lock:
                self._urgent.acknowledge(nbytes)
            self._messages.put(_LOOK)

    def put(self, message: bytes, is_result: bool = False) -> None:
        """Appends a message; does nothing once closed."""
        if self._closed:
            return
        size = _MESSAGE_BYTES if is_result else len(message) + _MESSAGE_BYTES
        self._put_bytes += size
        if self._put_bytes - self._taken_bytes <= self._most_bytes:
            self._sizes.put(size)
            self._messages.put(message)
            return
        refusal = Refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "Expected the worker to read what it is sent. Received: "
            f"{self._most_bytes} bytes that it has not read, as many as the service keeps for it "
            "(--max_worker_bytes).",
            "worker that does not read",
        )
        self.close(refusal)
        # Nobody may ask for what is left.
        with contextlib.suppress(queue.Empty):
            while True:
                self._messages.get_nowait()
        self._messages.put(None)
        if self.on_overflow is not None:
            self.on_overflow(refusal)

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can be put into it."""
        return self._closed

    def close(self, refusal: Refused | None = None) -> None:
        """Ends the stream after what is queued, or at once with a status. May be called twice."""
        self._refusal = self._refusal or refusal
        self._closed = True
        self._messages.put(None)

    def drain(self, poll_seconds: float = 60.0) -> Iterator[bytes]:
        """Yields messages until closed.

        Raises:
            Refused: If the stream was closed with a status.
        """
        looks = False
        while True:
            try:
                message = self._messages.get(timeout=poll_seconds)
            except queue.Empty:
                continue
            if self._refusal is not None:
                raise self._refusal
            if message is None:
                return
            if message is _LOOK:
                looks = True
            else:
                yield message
                # gRPC has taken the message over when it asks for the next one.
                self._taken_bytes += self._sizes.get_nowait()
            # What was said meanwhile comes first: little of it is said, and soon.
            if looks and self._messages.empty():
                looks = False
                yield from self._most_urgent()

    def _most_urgent(self) -> Iterator[bytes]:
        """Yields results until anything else is to be looked at, or no more may leave."""
        while self._messages.empty():
            with self._lock:
                if not self._urgent.is_ready:
                    return
                message, _ = self._urgent.take()
            yield message
        # There is more to look at.
        self._messages.put(_LOOK)


class Streams(dict[int, Outbox]):
    """The outboxes of the connected workers."""

    def tell(self, worker: int, message: pb.ToWorker) -> None:
        """Says something to a worker, if it is connected."""
        if worker in self:
            self[worker].put(wire.encode(message))

    def tell_sharers(self, segment: pb.Segment) -> None:
        """Offers a segment to the workers that share memory with the service."""
        data = wire.encode(pb.ToWorker(segment=segment))
        for outbox in self.values():
            if outbox.opened is not None:
                outbox.put(data)

    def tell_all(self, message: pb.ToWorker) -> None:
        """Says something to everybody."""
        data = wire.encode(message)
        for outbox in self.values():
            outbox.put(data)
