"""What the service has to say to the workers, to each of them in order."""

import collections
import threading
from collections.abc import Iterator

import grpc

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire


class Refused(Exception):
    """A message that the service refuses; the stream ends with this status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Outbox:
    """A queue of encoded messages that one stream drains.

    It holds references only: an aggregated slice is one buffer for all receivers. The rounds'
    window bounds how much can stand in it.
    """

    def __init__(self) -> None:
        self._messages: collections.deque[bytes] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._refusal: Refused | None = None

    def put(self, message: bytes) -> None:
        """Appends a message; does nothing once closed."""
        with self._changed:
            if not self._closed:
                self._messages.append(message)
                self._changed.notify()

    def close(self, refusal: Refused | None = None) -> None:
        """Ends the stream after what is queued, or at once with a status. May be called twice."""
        with self._changed:
            if refusal is not None and self._refusal is None:
                self._refusal = refusal
                self._messages.clear()
            self._closed = True
            self._changed.notify()

    def drain(self, poll_seconds: float = 1.0) -> Iterator[bytes]:
        """Yields messages until closed.

        Raises:
            Refused: If the stream was closed with a status.
        """
        while True:
            with self._changed:
                while not self._messages and not self._closed:
                    self._changed.wait(poll_seconds)
                if self._refusal is not None:
                    raise self._refusal
                if not self._messages:
                    return
                message = self._messages.popleft()
            yield message


class Streams(dict[int, Outbox]):
    """The outboxes of the connected workers."""

    def tell(self, worker: int, message: pb.ToWorker) -> None:
        """Says something to a worker, if it is connected."""
        if worker in self:
            self[worker].put(wire.encode(message))

    def tell_all(self, message: pb.ToWorker) -> None:
        """Says something to everybody."""
        data = wire.encode(message)
        for outbox in self.values():
            outbox.put(data)
