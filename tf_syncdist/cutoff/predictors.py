"""What predicts the next round's run-times, and how well it has predicted the last one."""

from typing import Protocol

import numpy as np

from tf_syncdist.cutoff.planning import RoundTimes

# Logarithms of times have no end at 0 seconds.
_LEAST_SECONDS = 1e-6

# Every predictor allows for so much that it knows nothing of: one time in fifty may be anything
# within a factor of e^5 up or down. It bounds the score of a single worker from below, too.
OUTLIERS = 0.02
_OUTLIER_DENSITY = 0.1


class Predictor(Protocol):
    """A causal model of all workers' run-times. Pure: the same rounds give the same samples."""

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over; rounds come in order."""
        ...

    def samples(self) -> np.ndarray:
        """Returns draws of the next round's times, jointly for all workers.

        Returns:
            float32 seconds, [draws, num_workers]; may be overwritten.

        Raises:
            RuntimeError: If no round was observed.
        """
        ...

    def log_score(self, times: RoundTimes) -> float:
        """Returns how likely a round is, before it is observed.

        The mean over the workers that were present of the logarithm of the density of their
        log-seconds or, for late ones, of the probability to be later than the round's end. Higher
        is better; comparable between predictors.
        """
        ...


class Logs:
    """A round in logarithms of seconds.

    Args:
        times: The round.

    Attributes:
        seen: bool, [num_workers]. Who was in before the end.
        late: int, [late]. The numbers of those who were present and were not.
        values: float64, [num_workers]. Of those who were in; elsewhere the logarithm of the
            round's length.
        closed: float. The logarithm of the round's length.
        present: int. How many were present.
    """

    def __init__(self, times: RoundTimes) -> None:
        self.seen = ~np.isnan(times.seconds)
        self.late = np.flatnonzero(times.present & ~self.seen)
        filled = np.where(self.seen, times.seconds, times.closed_seconds)
        self.values = np.log(np.maximum(filled, _LEAST_SECONDS))
        self.closed = float(np.log(max(times.closed_seconds, _LEAST_SECONDS)))
        self.present = int(self.seen.sum()) + len(self.late)


def log_score(logs: Logs, densities: np.ndarray, tails: np.ndarray) -> float:
    """Returns a predictor's score of a round.

    Args:
        logs: The round.
        densities: [num_workers]. The predicted density of each worker's log-seconds, at those of
            the round; of no matter for workers that were not in.
        tails: [late]. The predicted probability of each late worker to be late.
    """
    if not logs.present:
        return 0.0
    densities = (1 - OUTLIERS) * densities[logs.seen] + OUTLIERS * _OUTLIER_DENSITY
    tails = (1 - OUTLIERS) * tails + OUTLIERS / 2
    return float((np.log(densities).sum() + np.log(tails).sum()) / logs.present)


def expected_order(samples: np.ndarray, workers: np.ndarray) -> np.ndarray:
    """Returns E[time of the c-th arrival] for each c.

    Args:
        samples: [draws, num_workers]. Draws of the times; may be overwritten.
        workers: bool, [num_workers]. Who takes part.

    Returns:
        float64, [number of those who take part], ascending.
    """
    if not workers.all():
        samples = samples[:, workers]
    samples.sort(axis=1)
    return samples.mean(axis=0, dtype=np.float64)
