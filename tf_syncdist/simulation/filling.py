"""Traces with gaps: what late and absent workers may have needed."""

from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff.traces import Trace


class Filled(NamedTuple):
    """Run-times without gaps.

    Args:
        seconds: float64, [rounds, num_workers].
        late: How many times of late workers were made up,
        absent: and of absent ones.
    """

    seconds: np.ndarray
    late: int
    absent: int


def fill(trace: Trace, seed: int = 0) -> Filled:
    """Returns how long everybody would have needed in every round of a trace.

    A late worker's time is drawn from its own measured ones that are longer than the round was, or
    else from everybody's, or else it is the round's length. An absent worker's is drawn from its
    own measured ones, or else from everybody's.

    Args:
        trace: The trace.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    # A clock that does not advance between two messages yields 0.
    seconds = np.where(trace.seconds == 0, 1e-6, trace.seconds)
    everybody = np.sort(seconds[~np.isnan(seconds)])
    missing = np.isnan(seconds)
    late = missing & trace.present
    for worker in np.flatnonzero(missing.any(axis=0)):
        column = seconds[:, worker]
        own = np.sort(column[~np.isnan(column)])
        rounds = np.flatnonzero(missing[:, worker])
        least = np.where(late[rounds, worker], trace.closed_seconds[rounds], 0.0)
        column[rounds] = [_longer(s, own, everybody, rng) for s in least]
    return Filled(seconds, int(late.sum()), int((missing & ~trace.present).sum()))


def _longer(
    seconds: float, own: np.ndarray, everybody: np.ndarray, rng: np.random.Generator
) -> float:
    for known in (own, everybody):
        first = int(np.searchsorted(known, seconds, side="right"))
        if first < len(known):
            return float(known[rng.integers(first, len(known))])
    return seconds
