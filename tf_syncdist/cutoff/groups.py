"""Which workers slow down together, because they share a machine or a switch."""

import numpy as np

_LEAST_CORRELATION = 0.5

# In short traces workers of two machines may have been slow at the same time by chance; those of
# one machine go together much better.
_OF_BEST = 0.8


def learned(log_seconds: np.ndarray) -> np.ndarray:
    """Puts workers whose times go up and down together into groups.

    Args:
        log_seconds: float, [rounds, num_workers].

    Returns:
        int64, [num_workers]. The number of each worker's group, from 0. A worker that nobody goes
        with is a group of its own.

    Example:

    >>> machine = np.repeat(np.sin(np.arange(50.0))[:, None] * [1, 0, -1], 2, axis=1)
    >>> learned(machine + 0.01 * np.random.default_rng(0).standard_normal((50, 6)))
    array([0, 0, 1, 2, 3, 3])
    """
    centred = np.asarray(log_seconds, np.float32)
    centred = centred - centred.mean(axis=0)
    centred /= np.sqrt((centred**2).sum(axis=0)) + 1e-9
    group = np.full(centred.shape[1], -1)
    count = 0
    for worker in range(len(group)):
        if group[worker] < 0:
            correlation = centred[:, worker] @ centred
            correlation[worker] = 0
            least = max(_LEAST_CORRELATION, _OF_BEST * correlation.max())
            together = (correlation > least) & (group < 0)
            together[worker] = True
            group[together] = count
            count += 1
    return group


def membership(group: np.ndarray) -> np.ndarray:
    """Returns who is in which group as float32 ones and zeros, [num_workers, groups]."""
    return (group[:, None] == np.arange(group.max() + 1)).astype(np.float32)
