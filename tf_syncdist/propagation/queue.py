"""What waits to be sent, by urgency, and how much may be on its way. Pure."""

import heapq
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


# Of slices that leave in the order in which they were made, whatever the credit.
IN_ORDER = 2**32 - 1


class Urgency(NamedTuple):
    """In which order slices leave: the smallest first.

    Args:
        run: The run; older ones first, for a receiver that is behind.
        exchange: The exchange in the run.
        priority: Position of the slice's first use in the forward pass, from 0.
    """

    run: int
    exchange: int
    priority: int


class CreditQueue(Generic[Item]):
    """Hands over the most urgent item, as long as less than the credit is on its way.

    Stop-and-wait (a credit of one byte) leaves a fast network idle between two items, and without
    a bound all of them would stand in the network's own queue, in the order of their arrival there.

    Args:
        credit_bytes: How much may be on its way; the last item may exceed it.

    References:
        P3 (arXiv 1905.03960), section 4.2; ByteScheduler (SOSP 2019), section 4.2.
    """

    def __init__(self, credit_bytes: int) -> None:
        self._credit = credit_bytes
        self._items: list[tuple[Urgency, int, int, Item]] = []
        self._count = 0
        self._on_its_way = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def on_its_way(self) -> int:
        """Bytes that were handed over and have not been acknowledged."""
        return self._on_its_way

    def put(self, urgency: Urgency, nbytes: int, item: Item) -> None:
        """Appends an item; of equal urgency, those that came first leave first."""
        heapq.heappush(self._items, (urgency, self._count, nbytes, item))
        self._count += 1

    @property
    def is_ready(self) -> bool:
        """Whether there is something that may be handed over now."""
        return bool(self._items) and self._on_its_way < self._credit

    def take(self) -> tuple[Item, int]:
        """Hands over the most urgent item, with its size; to be called when `is_ready`."""
        _, _, nbytes, item = heapq.heappop(self._items)
        self._on_its_way += nbytes
        return item, nbytes

    def acknowledge(self, nbytes: int) -> None:
        """Takes note that so many bytes have arrived, or were not sent after all."""
        self._on_its_way = max(0, self._on_its_way - nbytes)


class Acknowledging:
    """Tells when to acknowledge what has arrived: not each slice, but before credit is used up.

    Args:
        credit_bytes: The sender's credit.
    """

    def __init__(self, credit_bytes: int) -> None:
        self._every = max(1, credit_bytes // 2)
        self._arrived = 0

    def arrived(self, nbytes: int) -> int:
        """Takes note of what has arrived and returns how much to acknowledge now, or 0."""
        self._arrived += nbytes
        if self._arrived < self._every:
            return 0
        nbytes, self._arrived = self._arrived, 0
        return nbytes
