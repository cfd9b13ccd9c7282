"""Prediction by exponential smoothing that follows jumps at once."""

import numpy as np

from tf_syncdist.cutoff.normal import log_tail
from tf_syncdist.cutoff.planning import RoundTimes
from tf_syncdist.cutoff.predictors import Logs, log_score

# A worker that was observed for k rounds since its last jump moves by 1/k of the way, no less
# than this.
_LEAST_RATE = 0.1

# A jump is a change by more than 28 % up or 22 % down.
_JUMP = 0.25

# What is kept of the last rounds, and from how many on it says more than a normal law does.
_MEMORY = 200
_ENOUGH = 20

_DRAWS = 100
_VARIANCE_RATE = 0.05
_FIRST_DEVIATION, _LEAST_DEVIATION = 0.05, 1e-3


class Smoother:
    """Takes every worker to go on as it was of late; needs no training and adapts to any change.

    Each worker has a level of its log-seconds, a mean that begins anew whenever the worker jumps.
    A late worker keeps its level if that is later than the round's end; otherwise it is taken to
    have been late by a little. What it draws are levels plus the joint deviations that all workers
    had in one of the last 200 rounds: if a whole machine slows down from time to time, draws do so.

    Args:
        num_workers: How many workers the job has.
        seed: Of the draws.

    References:
        Teng, Wood, arXiv 1803.04209, compares with predictions of this kind.
    """

    def __init__(self, num_workers: int, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._level = np.zeros(num_workers)
        self._age = np.zeros(num_workers)
        self._variance = _FIRST_DEVIATION**2
        self._deviations = np.zeros((_MEMORY, num_workers), np.float32)
        self._count = 0
        shape = (_DRAWS, num_workers)
        self._noise = self._random.standard_normal(shape, np.float32)
        self._imputed: np.ndarray | None = None

    @property
    def imputed(self) -> np.ndarray:
        """float64, [num_workers]. The last round's log-seconds; of late and absent ones imputed."""
        if self._imputed is None:
            raise RuntimeError("Expected a round to be observed before its times are asked for.")
        return self._imputed

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over; rounds come in order."""
        logs = Logs(times)
        values = logs.values
        known = self._age > 0
        level = np.where(known, self._level, values)
        noise = self._random.standard_normal(len(values)) * np.sqrt(self._variance)
        unseen = ~logs.seen
        values[unseen] = level[unseen] + noise[unseen]
        late = logs.late
        later = logs.closed + np.abs(noise[late])
        # The level, not a draw around it: being late again says nothing new.
        values[late] = np.where(level[late] > logs.closed, level[late], later)
        moved = values - level
        if self._imputed is not None:
            self._deviations[self._count % _MEMORY] = moved
            self._count += 1
        jumped = np.abs(moved) > _JUMP
        steady = logs.seen & known & ~jumped
        if steady.any():
            change = np.mean(moved[steady] ** 2) - self._variance
            self._variance += _VARIANCE_RATE * change
            self._variance = max(self._variance, _LEAST_DEVIATION**2)
        # Of an absent worker nothing new is known, and little of a late one.
        told = times.present | logs.seen
        self._age = np.where(told & jumped, 1, self._age + logs.seen)
        rate = np.maximum(_LEAST_RATE, 1 / np.maximum(self._age, 1))
        self._level = np.where(told, np.where(jumped, values, level + rate * moved), level)
        self._imputed = values

    def samples(self) -> np.ndarray:
        """Returns draws of the next round's times, float32 seconds, [draws, num_workers]."""
        if self._imputed is None:
            raise RuntimeError("Expected a round to be observed before the next is predicted.")
        kept = min(self._count, _MEMORY)
        if kept < _ENOUGH:
            drawn = self._noise * np.float32(np.sqrt(self._variance))
        else:
            drawn = self._deviations[np.arange(_DRAWS) * max(kept, _DRAWS) // _DRAWS % kept]
        drawn += self._level.astype(np.float32)
        return np.exp(drawn, out=drawn)

    def log_score(self, times: RoundTimes) -> float:
        """Returns how likely a round is, before it is observed; see `Predictor`."""
        logs = Logs(times)
        deviation = np.sqrt(self._variance)
        z = (logs.values - self._level) / deviation
        density = np.exp(-0.5 * z * z) / (deviation * np.sqrt(2 * np.pi))
        return log_score(logs, density, np.exp(log_tail(z[logs.late])))
