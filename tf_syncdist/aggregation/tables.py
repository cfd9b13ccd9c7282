"""One slice of a table on its way through the service, of which most rows are zero."""

import threading
import time
from collections.abc import Container

import numpy as np

from tf_syncdist.aggregation import sums
from tf_syncdist.aggregation.rounds import Closed
from tf_syncdist.propagation import rows
from tf_syncdist.propagation.queue import Urgency
from tf_syncdist.propagation.rows import Rows
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire


class TableSlot:
    """The sum of one slice of a table; has what `slots.Slot` has.

    Args:
        message: What the first worker says about the slice.
        in_order: Whether values are added in the order of the workers.
    """

    block = None

    def __init__(self, message: pb.Contribution, in_order: bool) -> None:
        self.claims = 0
        self.added: set[int] = set()
        self.closed: Closed | None = None
        self.row_elements = message.row_elements
        self._message = message
        self._in_order = in_order
        self._opened_at = time.monotonic()
        self._num_rows = message.elements // message.row_elements
        self._lock = threading.Lock()
        self._parts: dict[int, Rows] = {}
        self._result = b""
        self.nbytes = message.elements * sums.DTYPES[message.dtype][0].itemsize

    def add(self, worker: int, values: np.ndarray | Rows, in_turn: bool = False) -> None:
        """Adds a worker's values; see `slots.Slot`."""
        del in_turn
        if not isinstance(values, Rows):
            table = values.reshape(self._num_rows, -1)
            values = Rows(np.arange(self._num_rows), table)
        values = values._replace(values=sums.widen(values.values, self._message.dtype))
        with self._lock:
            self._parts[worker] = values

    def finish(self, replicas_to_aggregate: int) -> None:
        """Makes the result of the sum, once all values are added."""
        workers = sorted(self._parts) if self._in_order else list(self._parts)
        total = rows.add([self._parts.pop(w) for w in workers], self._num_rows)
        whole = not isinstance(total, Rows)
        values = total if whole else total.values
        sums.scale(values, len(self.closed.contributors), replicas_to_aggregate)
        on_wire, summed = sums.DTYPES[self._message.dtype]
        if on_wire != summed:
            narrow = np.empty(values.shape, on_wire)
            sums.narrow(values.reshape(-1), self._message.dtype, narrow.reshape(-1))
            values = narrow
        pieces = (
            (values.reshape(-1).view(np.uint8),)
            if whole
            else rows.pack(Rows(total.indices, values))
        )
        result = pb.Result(
            run=self.closed.key.run,
            exchange=self.closed.key.exchange,
            slice=self.closed.key.slice,
            num_slices=self._message.num_slices,
            contributors=self.closed.contributors,
            bytes=sum(p.nbytes for p in pieces),
            row_elements=0 if whole else self._message.row_elements,
            dtype=self._message.dtype,
            elements=self._message.elements,
            layout=self._message.layout,
            priority=self._message.priority,
            sum_seconds=time.monotonic() - self._opened_at,
        )
        self._result = wire.encode(pb.ToWorker(result=result), *pieces)

    @property
    def urgency(self) -> Urgency:
        """When the result leaves, if results leave by urgency."""
        return Urgency(self.closed.key.run, self.closed.key.exchange, self._message.priority)

    def result(self, opened: Container[int]) -> bytes:
        """Returns the message with the result, one and the same for all receivers."""
        del opened
        return self._result
