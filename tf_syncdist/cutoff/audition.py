"""Whether a predictor's cutoffs would have been better than any fixed one."""

import numpy as np

from tf_syncdist.cutoff.planning import RoundTimes


class Audition:
    """Compares planned cutoffs with fixed ones on rounds in which everybody was waited for.

    Args:
        num_workers: How many workers the job has.
    """

    def __init__(self, num_workers: int) -> None:
        self._orders = np.zeros(num_workers)
        self._rounds = 0
        self._contributions = 0
        self._seconds = 0.0

    @property
    def passed(self) -> bool:
        """Whether the plans gave more contributions per second than the best fixed cutoff.

        That one is chosen in hindsight, so plans are not taken for better by chance.
        """
        if not self._rounds:
            return False
        counts = np.arange(1, len(self._orders) + 1)
        best = np.max(counts * self._rounds / np.maximum(self._orders, 1e-12))
        return self._contributions > best * self._seconds

    def observe(self, times: RoundTimes, count: int) -> None:
        """Takes note of a round for which a cutoff was planned; of no use if not all were in.

        Args:
            times: The round.
            count: The planned cutoff, 1 to workers.
        """
        if np.isnan(times.seconds).any():
            return
        order = np.sort(times.seconds)
        self._orders += order
        self._rounds += 1
        self._contributions += count
        self._seconds += float(order[count - 1])
