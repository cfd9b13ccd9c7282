"""Run-times of workers on nodes that become slow now and then."""

import numpy as np

from tf_syncdist.cutoff import RoundTimes


def regimes(
    num_rounds: int, num_workers: int, nodes: int, factor: float, seed: int, cv: float = 0.05
) -> np.ndarray:
    """The law of teng2018's experiments: each node enters a slow state and leaves it by chance."""
    random = np.random.default_rng(seed)
    node = np.arange(num_workers) * nodes // num_workers
    slow = random.random(nodes) < 0.25
    seconds = np.empty((num_rounds, num_workers))
    for row in seconds:
        slow = np.where(slow, random.random(nodes) >= 0.03, random.random(nodes) < 0.01)
        noise = np.maximum(0.05, 1 + cv * random.standard_normal(num_workers))
        row[:] = np.where(slow[node], factor, 1.0) * noise
    return seconds


def round_times(seconds: np.ndarray, count: int | None = None, run: int = 0) -> RoundTimes:
    """A round that was closed with its first `count` contributions, or with all."""
    seconds = np.asarray(seconds, np.float64)
    closed = float(np.sort(seconds)[(count or len(seconds)) - 1])
    seen = np.where(seconds <= closed, seconds, np.nan)
    return RoundTimes(run, seen, closed, np.ones(len(seconds), bool))
