"""Contributions that have been read and not been added yet: the most urgent is added first.

The threads of all streams share one inbox. Each puts into it what it has read and then adds the
most urgent of all that wait there, which may be another worker's. So the queue needs no thread of
its own, and never holds more than what the workers' credit allows.
"""

import collections
import heapq
import threading
from collections.abc import Callable, Hashable

from tf_syncdist.propagation.queue import Urgency

# Whatever a thread waits for is being done by another one, and takes milliseconds.
_LOOK_AGAIN_SECONDS = 1.0


class Inbox:
    """A queue by urgency for several threads."""

    def __init__(self) -> None:
        self._items: list[tuple[Urgency, int, Hashable, Callable[[], None]]] = []
        self._number = 0
        self._left: collections.Counter[Hashable] = collections.Counter()
        self._changed = threading.Condition()

    def put_and_do(self, owner: Hashable, urgency: Urgency, do: Callable[[], None]) -> None:
        """Puts something to be done, and does the most urgent of what there is.

        Args:
            owner: Whose it is.
            urgency: How urgent it is; the smallest is done first.
            do: Does it. It must not wait for anything that is done by way of the inbox.
        """
        with self._changed:
            heapq.heappush(self._items, (urgency, self._number, owner, do))
            self._number += 1
            self._left[owner] += 1
            _, _, other, do = heapq.heappop(self._items)
        try:
            do()
        finally:
            with self._changed:
                self._left[other] -= 1
                if not self._left[other]:
                    del self._left[other]
                    self._changed.notify_all()

    def wait_for(self, owner: Hashable) -> None:
        """Returns when all that an owner has put is done."""
        with self._changed:
            while owner in self._left:
                self._changed.wait(_LOOK_AGAIN_SECONDS)
