"""The delays of benchmarks.cutoff_jobs: alike in all of its processes, and in its simulation."""

from __future__ import annotations

import numpy as np

from tf_syncdist.simulation import laws

# Each worker is a node, which changes three times as often as in the literature: a job of some
# minutes is to see many changes.
_ENTER, _LEAVE = 0.03, 0.09


def seconds(
    rounds: int, num_workers: int, step_seconds: float, factor: float, seed: int
) -> np.ndarray:
    """Returns for how long each worker sleeps in each round.

    Args:
        rounds: How many rounds.
        num_workers: How many workers.
        step_seconds: The mean of a worker that is not slow.
        factor: By what a slow one takes longer.
        seed: Seed of all draws.
    """
    law = laws.RegimeSwitching(factor, num_workers, _ENTER, _LEAVE)
    return step_seconds * law.sample(rounds, num_workers, np.random.default_rng(seed))
