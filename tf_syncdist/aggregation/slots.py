"""One slice on its way through the service: values are added, then the result is laid out.

Adding needs no lock of the job's: values of different slices are added at the same time.
"""

import threading
import time
from collections.abc import Container

import numpy as np

from tf_syncdist.aggregation import sums
from tf_syncdist.aggregation.memory import Block
from tf_syncdist.aggregation.rounds import Closed
from tf_syncdist.propagation import rows
from tf_syncdist.propagation.queue import Urgency
from tf_syncdist.propagation.rows import Rows
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire


class Slot:
    """The sum of one slice, in the very memory from which it goes to the workers.

    Args:
        message: What the first worker says about the slice.
        block: Shared memory for the result; `None` if all of it travels in messages.
        num_workers: How many workers the result may name.
        in_order: Whether values are added in the order of the workers.

    Attributes:
        block: See above.
        claims: How many contributions are accepted and not yet added. Guarded by the job's lock.
        added: The workers whose values have been added. Guarded by the job's lock.
        closed: Set when no more are accepted. Guarded by the job's lock.
        nbytes: Size of the values if all of them travel.
    """

    def __init__(
        self, message: pb.Contribution, block: Block | None, num_workers: int, in_order: bool
    ) -> None:
        self.block = block
        self.claims = 0
        self.added: set[int] = set()
        self.closed: Closed | None = None
        self._message = message
        self._on_wire, summed = sums.DTYPES[message.dtype]
        self.nbytes = message.elements * self._on_wire.itemsize
        self._frame = None
        if block is None:
            # A header without contributors needs less than 104 bytes, a contributor at most 3.
            self._frame = wire.Frame(self.nbytes, 128 + 3 * num_workers)
            self._data = self._frame.payload
        else:
            self._data = block.data
        self._lock = threading.Lock()
        self._in_order = in_order
        self._parts: dict[int, np.ndarray] = {}
        self._opened_at = time.monotonic()
        self._sum_seconds = 0.0
        self._first: np.ndarray | None = None
        self._is_begun = False
        if summed == self._on_wire:
            self._total = self._data.view(summed)
        else:
            self._total = np.empty(message.elements, summed)
        self._messages: dict[bool, bytes] = {}

    def add(self, worker: int, values: np.ndarray | Rows, in_turn: bool = False) -> None:
        """Adds a worker's values.

        Args:
            worker: The worker.
            values: Its values as they were sent, which must stay as they are until the result is
                published.
            in_turn: Whether no worker before this one has values yet to come.
        """
        if isinstance(values, Rows):
            values = rows.dense(values, self._message.elements // values.values.shape[1])
        values = sums.widen(values.reshape(-1), self._message.dtype)
        with self._lock:
            if not self._in_order:
                self._add(values)
                return
            self._parts[worker] = values
            if in_turn:
                self._add_parts(worker)

    def finish(self, replicas_to_aggregate: int) -> None:
        """Makes the result of the sum, once all values are added."""
        if self._parts:
            self._add_parts(max(self._parts))
        if self._first is not None:
            self._total[...] = self._first
            self._first = None
        sums.scale(self._total, len(self.closed.contributors), replicas_to_aggregate)
        if self._total.dtype != self._on_wire:
            sums.narrow(self._total, self._message.dtype, self._data.view(self._on_wire))
        self._total = None
        self._sum_seconds = time.monotonic() - self._opened_at
        if self._frame is not None:
            self._messages[False] = self._frame.seal(self._header(in_memory=False))
            self._frame = None

    @property
    def urgency(self) -> Urgency:
        """When the result leaves, if results leave by urgency."""
        return Urgency(self.closed.key.run, self.closed.key.exchange, self._message.priority)

    def result(self, opened: Container[int]) -> bytes:
        """Returns the message with the result, one and the same for all receivers.

        Args:
            opened: The service's segments that the receiver can read.
        """
        in_memory = self.block is not None and self.block.segment in opened
        if in_memory not in self._messages:
            payload = () if in_memory else (memoryview(self._data),)
            self._messages[in_memory] = wire.encode(self._header(in_memory), *payload)
        return self._messages[in_memory]

    def _add_parts(self, last: int) -> None:
        for worker in sorted(w for w in self._parts if w <= last):
            self._add(self._parts.pop(worker))

    def _add(self, values: np.ndarray) -> None:
        # The first values are used where they are, which spares one copy of them.
        if not self._is_begun:
            self._is_begun = True
            self._first = values
            return
        sums.add(self._total, self._first, values)
        self._first = None

    def _header(self, in_memory: bool) -> pb.ToWorker:
        key = self.closed.key
        result = pb.Result(
            run=key.run,
            exchange=key.exchange,
            slice=key.slice,
            num_slices=self._message.num_slices,
            contributors=self.closed.contributors,
            bytes=self.nbytes,
            dtype=self._message.dtype,
            elements=self._message.elements,
            layout=self._message.layout,
            priority=self._message.priority,
            sum_seconds=self._sum_seconds,
        )
        if in_memory:
            result.location.segment = self.block.segment
            result.location.offset = self.block.offset
        return pb.ToWorker(result=result)


class StoredSlot:
    """A result that a worker has given to a service that was started again.

    Args:
        result: The result.
        payload: Its values.
    """

    block = None

    def __init__(self, result: pb.Result, payload: memoryview) -> None:
        self._message = wire.encode(pb.ToWorker(result=result), payload)
        self.nbytes = result.elements * sums.DTYPES[result.dtype][0].itemsize
        self.urgency = Urgency(result.run, result.exchange, result.priority)

    def result(self, opened: Container[int]) -> bytes:
        """Returns the message with the result, one and the same for all receivers."""
        return self._message
