"""A worker's side of the memory that it shares with one shard.

Contributions lie in segments of the worker. One is used again as soon as the result of its
exchange has come, because the service reads no contribution of a slice that is closed. Until the
service has answered that it can read a segment, values travel in the messages.
"""

from collections.abc import Callable

import numpy as np

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.segments import Offer, Segment, SegmentError


class Lending:
    """Segments for the contributions of one worker to one shard.

    Args:
        send: Sends a message to the shard.
    """

    def __init__(self, send: Callable[[pb.ToAggregator], None]) -> None:
        self._send = send
        self._segments: dict[int, Segment] = {}
        self._answered: set[int] = set()
        self._lent: dict[tuple[int, int], int] = {}
        self._refused = False

    def prepare(self, nbytes: int) -> bool:
        """Offers a segment of a size if there is none to use.

        Returns:
            Whether it is known whether it can be used.

        Raises:
            SegmentError: If memory cannot be had.
        """
        if self._refused:
            return True
        fitting = self._fitting(nbytes)
        if not fitting:
            self._offer(nbytes)
            fitting = self._fitting(nbytes)
        return bool(self._answered.intersection(fitting))

    def lend(self, run: int, exchange: int, nbytes: int) -> tuple[int, np.ndarray] | None:
        """Returns a segment's number and its bytes for an exchange, if there is one to use.

        Args:
            run: The run.
            exchange: Number of the exchange in the run.
            nbytes: How many bytes it needs.
        """
        key = (run, exchange)
        if key not in self._lent:
            usable = self._answered.intersection(self._fitting(nbytes))
            if self._refused or not usable:
                return None
            self._lent[key] = min(usable, key=lambda n: self._segments[n].data.nbytes)
        number = self._lent[key]
        return number, self._segments[number].data

    def is_lent(self, run: int, exchange: int) -> bool:
        """Returns whether an exchange has a segment."""
        return (run, exchange) in self._lent

    def done(self, run: int, exchange: int | None = None) -> None:
        """Takes note that the service needs an exchange's values no more, or all up to a run's."""
        for key in [
            k for k in self._lent if k[0] < run or (k[0] == run and exchange in (None, k[1]))
        ]:
            del self._lent[key]

    def answered(self, answer: pb.SegmentAnswer) -> None:
        """Takes note of what the service says of a segment."""
        if answer.error:
            self._refused = True
        elif answer.id in self._segments:
            self._answered.add(answer.id)

    def close(self) -> None:
        """Gives the memory back. May be called twice."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._lent.clear()
        self._refused = True

    def _fitting(self, nbytes: int) -> list[int]:
        lent = self._lent.values()
        return [n for n, s in self._segments.items() if s.data.nbytes >= nbytes and n not in lent]

    def _offer(self, nbytes: int) -> None:
        try:
            segment = Segment.create(nbytes)
        except SegmentError:
            self._refused = True
            raise
        number = len(self._segments)
        self._segments[number] = segment
        pid, fd, size, token = segment.offer
        offer = pb.Segment(id=number, pid=pid, fd=fd, size=size, token=token)
        self._send(pb.ToAggregator(segment=offer))


class Opened:
    """The segments of one shard that this worker reads results from."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def open(self, message: pb.Segment) -> None:
        """Opens a segment.

        Raises:
            SegmentError: If that is not possible.
        """
        offer = Offer(message.pid, message.fd, message.size, message.token)
        self._segments[message.id] = Segment.open(offer)

    def read(self, location: pb.Location, nbytes: int) -> memoryview:
        """Returns bytes of a segment without copying them."""
        data = self._segments[location.segment].data
        return memoryview(data[location.offset : location.offset + nbytes])

    def close(self) -> None:
        """Gives the memory back. May be called twice."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
