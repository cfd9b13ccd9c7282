"""Memory that the service and workers of the same machine share.

Results lie in blocks of the service's segments, which workers read; contributions lie in segments
of the workers. A block is used again when every worker that was told of it has read it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.segments import Offer, Segment, SegmentError

_LEAST_BYTES = 2**20
_MOST_BYTES = 256 * 2**20
_PAGE = 4096

# An exchange in progress needs one segment, and each takes a file descriptor of the service.
_MOST_SEGMENTS = 64


class Block(NamedTuple):
    """A piece of one of the service's segments.

    Args:
        segment: Number of the segment.
        offset: Byte at which the piece begins.
        data: Its bytes, writable.
    """

    segment: int
    offset: int
    data: np.ndarray


class ResultMemory:
    """The service's own segments, in blocks.

    Args:
        on_segment: Called with every new segment, to tell workers of it.
        on_event: Called with one line for the service's log.
        most_bytes: How much memory is taken at most. Blocks are kept for results of the same
            size, so new sizes in every round would take ever more.
    """

    def __init__(
        self,
        on_segment: Callable[[pb.Segment], None],
        on_event: Callable[[str], None],
        most_bytes: int,
    ) -> None:
        self._most_bytes = most_bytes
        self._on_segment = on_segment
        self._on_event = on_event
        self._segments: list[Segment] = []
        self._free: dict[int, list[Block]] = {}
        self._used = 0
        self._failed = False

    def take(self, nbytes: int, count: int = 1) -> Block | None:
        """Returns a block, `None` if there is no memory for it.

        Args:
            nbytes: Size of the block.
            count: How many of about this size are going to be needed.
        """
        size = -(-nbytes // _PAGE) * _PAGE
        if self._free.get(size):
            block = self._free[size].pop()
        elif not self._failed:
            block = self._carve(size, min(size * count, _MOST_BYTES))
        else:
            return None
        return block and block._replace(data=block.data[:nbytes])

    def give_back(self, block: Block) -> None:
        """Takes back a block that nobody reads any more."""
        size = -(-block.data.nbytes // _PAGE) * _PAGE
        whole = self._segments[block.segment].data[block.offset : block.offset + size]
        self._free.setdefault(size, []).append(block._replace(data=whole))

    def has(self, segment: int) -> bool:
        """Returns whether there is a segment of that number."""
        return segment < len(self._segments)

    def offers(self) -> list[pb.Segment]:
        """Returns what a worker must be told to read all of the memory."""
        return [
            pb.Segment(id=i, pid=s.offer.pid, fd=s.offer.fd, size=s.offer.size, token=s.offer.token)
            for i, s in enumerate(self._segments)
        ]

    def _carve(self, size: int, expected: int) -> Block | None:
        if not self._segments or self._used + size > self._segments[-1].offer.size:
            expected = min(expected, self._most_bytes - sum(s.offer.size for s in self._segments))
            if expected < size:
                # This result travels in messages; a later one finds blocks that were given back.
                return None
            try:
                # Few segments: until workers have opened one, results travel in messages.
                self._segments.append(Segment.create(max(size, expected, _LEAST_BYTES)))
            except SegmentError as e:
                self._failed = True
                self._on_event(f"{e}; results travel over gRPC")
                return None
            self._used = 0
            self._on_segment(self.offers()[-1])
        start, self._used = self._used, self._used + size
        number = len(self._segments) - 1
        return Block(number, start, self._segments[number].data[start : start + size])


class WorkerMemory:
    """The segments of one worker, opened to read its contributions."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def open(self, message: pb.Segment) -> pb.SegmentAnswer:
        """Opens a segment and returns the answer for the worker."""
        offer = Offer(message.pid, message.fd, message.size, message.token)
        try:
            if message.id in self._segments:
                raise SegmentError(f"segment {message.id} is there already")
            if len(self._segments) >= _MOST_SEGMENTS:
                raise SegmentError(f"{_MOST_SEGMENTS} segments are there already")
            self._segments[message.id] = Segment.open(offer)
        except SegmentError as e:
            return pb.SegmentAnswer(id=message.id, error=str(e))
        return pb.SegmentAnswer(id=message.id)

    def read(self, location: pb.Location, nbytes: int) -> np.ndarray | None:
        """Returns bytes of a segment without copying them; `None` if there are no such ones."""
        segment = self._segments.get(location.segment)
        if segment is None or location.offset + nbytes > segment.data.nbytes:
            return None
        return segment.data[location.offset : location.offset + nbytes]
