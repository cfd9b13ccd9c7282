"""The cutoff for workers whose times are normally distributed."""

import collections
import dataclasses
import math
import statistics

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
from tf_syncdist.cutoff.order_statistics import best_count
from tf_syncdist.cutoff.planning import Plan, RoundTimes

_NORMAL = statistics.NormalDist()

# Enough from scratch; the estimate before is nearly right besides.
_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Elfving(FrozenPolicy):
    """Waits for as many workers as are best if all times follow one normal law.

    Mean and standard deviation are those of greatest likelihood given the last rounds, where a
    late worker counts as one that needed more than the round's length. Times of which some are
    very long, or that have several modes, mislead it: use `OrderStatistics` or `LearnedCutoff`.

    Args:
        window: How many of the last rounds count, at least 1. Default 20.
        min_fraction: No fewer than this fraction of the workers, above 0 and at most 1. Default
            0.25. Raise it if an update of few contributions is not worth having.

    Raises:
        ValueError: If an argument is no such number.

    Example:

    >>> import numpy as np
    >>> from tf_syncdist.cutoff import Elfving, RoundTimes
    >>> planner = Elfving().planner(num_workers=158)
    >>> seconds = np.random.default_rng(0).normal(1, 0.1, 158)
    >>> planner.observe(RoundTimes(0, seconds, seconds.max(), np.ones(158, bool)))
    >>> planner.plan().count
    153

    References:
        Elfving: The asymptotical distribution of range in samples from a normal population,
        Biometrika 34, 1947; as baseline in Teng, Wood, arXiv 1803.04209.
    """

    window: int = 20
    min_fraction: float = 0.25

    def __post_init__(self) -> None:
        check_window(self.window)
        check_min_fraction(self.min_fraction)

    def planner(self, num_workers: int) -> "ElfvingPlanner":
        """Returns a new memory of the window."""
        return ElfvingPlanner(self, num_workers)

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice with as many contributions as are planned."""
        return close_as_planned(view, self.min_fraction)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What is left of a round: how many times were measured, and how many were longer."""

    known: int
    total: float
    squares: float
    late: int
    closed_seconds: float


class ElfvingPlanner:
    """The mean and the standard deviation of the last rounds.

    Args:
        policy: How much to remember, and how few workers may do.
        num_workers: How many workers the job has.
    """

    def __init__(self, policy: Elfving, num_workers: int) -> None:
        self._least = least_count(policy.min_fraction, num_workers)
        self._num_workers = num_workers
        self._present = num_workers
        self._rounds: collections.deque[_Sums] = collections.deque(maxlen=policy.window)
        self._mean, self._deviation = 0.0, 0.0
        self._scores = normal_scores(num_workers)

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over."""
        present = int(times.present.sum())
        known = times.seconds[times.present & ~np.isnan(times.seconds)]
        if not present or not len(known):
            return
        late = present - len(known)
        self._rounds.append(
            _Sums(len(known), known.sum(), (known**2).sum(), late, times.closed_seconds)
        )
        if present != self._present:
            self._present, self._scores = present, normal_scores(present)
        self._estimate()

    def plan(self) -> Plan:
        """Returns the best number of contributions under the estimated law."""
        if not self._rounds:
            return Plan(self._num_workers, None, "no round is over yet")
        expected = self._mean + self._deviation * self._scores
        # A normal law knows negative times; contributions per second would be best just above 0.
        first = int(np.searchsorted(expected, 0.0, side="right")) + 1
        count = best_count(expected, max(self._least, first))
        reason = (
            f"normal law with mean {self._mean:.3g} s and standard deviation "
            f"{self._deviation:.2g} s over the last {len(self._rounds)} round(s)"
        )
        return Plan(count, float(expected[count - 1]), reason)

    def _estimate(self) -> None:
        """Finds mean and deviation of greatest likelihood by expectation and maximisation."""
        known = sum(r.known for r in self._rounds)
        total = sum(r.total for r in self._rounds)
        squares = sum(r.squares for r in self._rounds)
        late = [r for r in self._rounds if r.late]
        everybody = known + sum(r.late for r in late)
        if not late or not self._deviation:
            self._mean = total / known
            self._deviation = math.sqrt(max(0.0, squares / known - self._mean**2))
        if not late or not self._deviation:
            return
        for _ in range(_STEPS):
            mean, deviation = self._mean, self._deviation
            first, second = total, squares
            for r in late:
                excess = deviation * _hazard((r.closed_seconds - mean) / deviation)
                first += r.late * (mean + excess)
                second += r.late * (mean**2 + deviation**2 + excess * (r.closed_seconds + mean))
            self._mean = first / everybody
            self._deviation = math.sqrt(max(0.0, second / everybody - self._mean**2))
            if not self._deviation:
                return


def normal_scores(count: int) -> np.ndarray:
    """Returns Elfving's approximation of the order statistics of a standard normal sample.

    Args:
        count: The size of the sample.

    Returns:
        float64, [count], ascending.
    """
    shares = (np.arange(1, count + 1) - math.pi / 8) / (count - math.pi / 4 + 1)
    return np.array([_NORMAL.inv_cdf(share) for share in shares])


def _hazard(z: float) -> float:
    """Returns pdf(z) / (1 - cdf(z)) of the standard normal law."""
    if z > 30:
        return z  # where the quotient is 0 / 0
    return math.exp(-z * z / 2) / (math.sqrt(math.pi / 2) * math.erfc(z / math.sqrt(2)))
