"""The simplest cutoff that adapts: what the last rounds would have given."""

import collections
import dataclasses

import numpy as np

from tf_syncdist.cutoff.decisions import (
    Decision,
    FrozenPolicy,
    SliceView,
    check_min_fraction,
    check_window,
    close_as_planned,
    least_count,
)
from tf_syncdist.cutoff.planning import Plan, RoundTimes


@dataclasses.dataclass(frozen=True)
class OrderStatistics(FrozenPolicy):
    """Waits for as many workers as would have given most contributions per second lately.

    A late worker is known to have needed more than the round's length. Its time is taken from all
    times of the window that are longer than that, so what is not waited for is not forgotten.

    Args:
        window: How many of the last rounds count, at least 1. Default 10. Raise it if the workers'
            times only scatter; lower it if the same workers are slow for a few rounds on end.
        min_fraction: No fewer than this fraction of the workers, above 0 and at most 1. Default
            0.25. Raise it if an update of few contributions is not worth having.

    Raises:
        ValueError: If an argument is no such number.

    Example:

    >>> import numpy as np
    >>> from tf_syncdist.cutoff import OrderStatistics, RoundTimes
    >>> planner = OrderStatistics().planner(num_workers=4)
    >>> times = RoundTimes(0, np.array([1.0, 1.1, 1.2, 9.0]), 9.0, np.ones(4, bool))
    >>> planner.observe(times)
    >>> planner.plan()
    Plan(count=3, expected_seconds=1.2, reason='best of the last 1 round(s)')

    References:
        Teng, Wood: High Throughput Synchronous Distributed SGD, arXiv 1803.04209, whose criterion
        this applies to measured times instead of predicted ones.
    """

    window: int = 10
    min_fraction: float = 0.25

    def __post_init__(self) -> None:
        check_window(self.window)
        check_min_fraction(self.min_fraction)

    def planner(self, num_workers: int) -> "OrderStatisticsPlanner":
        """Returns a new memory of the window."""
        return OrderStatisticsPlanner(self, num_workers)

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice with as many contributions as are planned."""
        return close_as_planned(view, self.min_fraction)


class OrderStatisticsPlanner:
    """The times of the last rounds, each of them sorted, with late ones filled in.

    Args:
        policy: How much to remember, and how few workers may do.
        num_workers: How many workers the job has.
    """

    def __init__(self, policy: OrderStatistics, num_workers: int) -> None:
        self._least = least_count(policy.min_fraction, num_workers)
        self._num_workers = num_workers
        self._rows: collections.deque[np.ndarray] = collections.deque(maxlen=policy.window)

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over."""
        known = np.sort(times.seconds[times.present & ~np.isnan(times.seconds)])
        late = int(times.present.sum()) - len(known)
        if len(known) + late:
            tail = self._longer_than(times.closed_seconds, late)
            self._rows.append(np.concatenate((known, tail)))

    def plan(self) -> Plan:
        """Returns how many contributions have been best in the window."""
        if not self._rows:
            return Plan(self._num_workers, None, "no round is over yet")
        size = len(self._rows[-1])
        expected = np.mean([_resized(row, size) for row in self._rows], axis=0)
        count = best_count(expected, self._least)
        reason = f"best of the last {len(self._rows)} round(s)"
        return Plan(count, float(expected[count - 1]), reason)

    def _longer_than(self, seconds: float, count: int) -> np.ndarray:
        """Returns quantiles of the window's times that are longer than that of a round.

        Under the assumption that all times follow one law these are what late workers may have
        needed. Quantiles instead of draws: equal rounds give equal plans.
        """
        longer = [row[np.searchsorted(row, seconds, side="right") :] for row in self._rows]
        tail = np.concatenate(longer) if longer else np.empty(0)
        if not count or not len(tail):
            return np.full(count, seconds)
        return np.quantile(tail, (np.arange(count) + 0.5) / count)


def best_count(expected_seconds: np.ndarray, least: int) -> int:
    """Returns the c that maximises c / E[time of the c-th arrival].

    Args:
        expected_seconds: float64, [workers], ascending.
        least: The smallest c that may be chosen; if there are fewer workers, all are.
    """
    first = min(least, len(expected_seconds)) - 1
    counts = np.arange(first + 1, len(expected_seconds) + 1)
    return int(counts[np.argmax(counts / np.maximum(expected_seconds[first:], 1e-12))])


def _resized(row: np.ndarray, size: int) -> np.ndarray:
    """Returns the order statistics of a row as if another number of workers had taken part."""
    if len(row) == size:
        return row
    at = (np.arange(size) + 0.5) / size
    return np.interp(at, (np.arange(len(row)) + 0.5) / len(row), row)
