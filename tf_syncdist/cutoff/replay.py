"""What cutoffs would have given on rounds whose run-times are known."""

from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff.order_statistics import best_count
from tf_syncdist.cutoff.planning import RoundTimes
from tf_syncdist.cutoff.predictors import Predictor, expected_order


class Replay(NamedTuple):
    """What a predictor's cutoffs have given.

    Args:
        counts: int64, [rounds]. The contributions to each round.
        seconds: float64, [rounds]. How long each round took.
    """

    counts: np.ndarray
    seconds: np.ndarray

    @property
    def throughput(self) -> float:
        """Contributions per second."""
        return float(self.counts.sum() / self.seconds.sum())


def replay(predictor: Predictor, seconds: np.ndarray, least: int, full_rounds: int = 1) -> Replay:
    """Cuts every round where a predictor expects most contributions per second.

    The predictor sees of each round what it would have seen: late workers' times are hidden.

    Args:
        predictor: The predictor.
        seconds: float64, [rounds, num_workers]. Everybody's times.
        least: The smallest cutoff.
        full_rounds: In how many rounds at the beginning everybody is waited for, at least 1.
    """
    num_rounds, num_workers = seconds.shape
    everybody = np.ones(num_workers, bool)
    counts, lengths = np.empty(num_rounds, np.int64), np.empty(num_rounds)
    for run, row in enumerate(seconds):
        count = num_workers
        if run >= full_rounds:
            count = best_count(expected_order(predictor.samples(), everybody), least)
        closed = float(np.partition(row, count - 1)[count - 1])
        counts[run], lengths[run] = count, closed
        seen = np.where(row <= closed, row, np.nan)
        predictor.observe(RoundTimes(run, seen, closed, everybody))
    return Replay(counts, lengths)


def static_throughputs(seconds: np.ndarray) -> np.ndarray:
    """Returns the contributions per second of every fixed number of workers, from 1 to all.

    Args:
        seconds: float64, [rounds, num_workers]. Everybody's times.

    Example:

    >>> static_throughputs(np.array([[1.0, 4.0], [4.0, 1.0]]))
    array([1. , 0.5])
    """
    lengths = np.sort(seconds, axis=1).sum(axis=0)
    return np.arange(1, seconds.shape[1] + 1) * len(seconds) / lengths


def oracle_throughput(seconds: np.ndarray, least: int = 1) -> float:
    """Returns the contributions per second of cutting each round where that is most.

    Args:
        seconds: float64, [rounds, num_workers]. Everybody's times.
        least: The smallest cutoff.
    """
    order = np.sort(seconds, axis=1)
    counts = np.array([best_count(row, least) for row in order])
    return float(counts.sum() / order[np.arange(len(order)), counts - 1].sum())
