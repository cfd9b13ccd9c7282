"""What the service has to say to the workers, to each of them in order."""

import queue
from collections.abc import Iterator

import grpc

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# gRPC sends no status whose text is longer than some thousand bytes.
_MOST_DETAILS = 1500


class Refused(Exception):
    """A message that the service refuses; the stream ends with this status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        if len(details) > _MOST_DETAILS:
            half = _MOST_DETAILS // 2
            details = f"{details[:half]} [...] {details[-half:]}"
        # It may name what a worker has said, which need not be text that can be sent.
        details = details.encode(errors="backslashreplace").decode()
        super().__init__(details)
        self.code = code
        self.details = details


class Outbox:
    """A queue of encoded messages that one stream drains.

    It holds references only: an aggregated slice is one buffer for all receivers. The rounds'
    window bounds how much can stand in it.

    Args:
        shares: Whether the worker wants to share memory with the service.

    Attributes:
        opened: The service's segments that the worker can read; `None` if it shares none.
    """

    def __init__(self, shares: bool = False) -> None:
        self.opened: set[int] | None = set() if shares else None
        # `None` says that nothing more comes.
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._refusal: Refused | None = None

    def put(self, message: bytes) -> None:
        """Appends a message; does nothing once closed."""
        if not self._closed:
            self._messages.put(message)

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
        while True:
            try:
                message = self._messages.get(timeout=poll_seconds)
            except queue.Empty:
                continue
            if self._refusal is not None:
                raise self._refusal
            if message is None:
                return
            yield message


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
