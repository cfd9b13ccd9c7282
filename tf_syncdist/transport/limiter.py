"""A slow link on a fast machine: for tests and benchmarks of what a thin network does."""

import threading
import time
from collections.abc import Callable

# What may pass at once after a pause; a network card's queue holds about as much.
_BURST_SECONDS = 0.001


class Limiter:
    """Lets bytes pass at a given rate; several streams may share it.

    Args:
        gbps: Gigabits per second; 0 for no limit.
        clock: Returns the time in seconds; monotonic.
        sleep: Waits for some seconds.

    Attributes:
        gbps: See above.
    """

    def __init__(
        self,
        gbps: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.limit(gbps)
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = 0.0

    def limit(self, gbps: float) -> None:
        """Changes the rate; 0 for no limit."""
        self.gbps = gbps
        self._seconds_per_byte = 8e-9 / gbps if gbps else 0.0

    def take(self, nbytes: int) -> None:
        """Waits as long as the link takes for so many bytes, after those before them."""
        if not self._seconds_per_byte:
            return
        with self._lock:
            begin = max(self._free_at, self._clock() - _BURST_SECONDS)
            self._free_at = begin + nbytes * self._seconds_per_byte
            left = self._free_at - self._clock()
        if left > 0:
            self._sleep(left)
