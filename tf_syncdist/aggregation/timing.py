"""How long the workers took for a round. Pure."""

import math
from collections.abc import Iterable

import numpy as np

from tf_syncdist.cutoff import RoundTimes

# More slices than any round has.
_ALL = 2**62


class RoundTimer:
    """Takes note of when the values of one round come.

    Args:
        num_workers: How many workers the job has.
        since: When the round before was closed, in seconds; minus infinity if that is not known.

    Attributes:
        opened_at: When the round began: when the one before was closed or, if all that have been
            heard of began later, when the first of them did. It can only become earlier.
        is_partial: Whether some of it happened before this process was there to see it.
    """

    __slots__ = ("_closed_at", "_count", "_last", "_since", "is_partial", "opened_at")

    def __init__(self, num_workers: int, since: float) -> None:
        self.opened_at = math.inf
        self.is_partial = False
        self._since = since
        self._closed_at: float | None = None
        self._count = [0] * num_workers
        self._last = [math.nan] * num_workers

    @property
    def closed_at(self) -> float | None:
        """When the last slice was closed that is closed, in seconds."""
        return self._closed_at

    def arrive(self, worker: int, now: float, elapsed_seconds: float) -> None:
        """Takes note of a slice of a worker that has been computing for so long."""
        self._count[worker] += 1
        self._last[worker] = now
        began = now - elapsed_seconds
        if began < self.opened_at:
            self.opened_at = began if began > self._since else self._since

    def arrive_whole(self, worker: int, now: float, elapsed_seconds: float) -> None:
        """Takes note that a worker has all of its values, and nothing more comes from it."""
        if self._count[worker] < _ALL:
            self.arrive(worker, now, elapsed_seconds)
            self._count[worker] = _ALL

    def close(self, now: float) -> None:
        """Takes note that a slice was closed."""
        self._closed_at = now

    def times(self, run: int, slices: int, takes_part: Iterable[int]) -> RoundTimes | None:
        """Returns how long everybody took, if that is known.

        Args:
            run: The run that the round is of.
            slices: How many slices it had.
            takes_part: The workers that could take part.
        """
        if self.is_partial or self._closed_at is None or not math.isfinite(self.opened_at):
            return None
        seconds = np.array(self._last, np.float64) - self.opened_at
        seconds[np.array(self._count) < slices] = np.nan
        present = np.zeros(len(seconds), bool)
        present[list(takes_part)] = True
        present |= ~np.isnan(seconds)
        return RoundTimes(run, seconds, self._closed_at - self.opened_at, present)
