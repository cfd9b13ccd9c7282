"""Batches of windows for the training of a deep Markov model."""

import numpy as np

# In so many batches each group of workers comes from other rounds than the others.
_SHUFFLED = 0.75


class Batches:
    """Draws windows from a trace.

    Groups that do not go together in the cluster cannot be learned to do so if their histories are
    combined anew in each batch, so much more is learned from as many rounds.

    Args:
        times: float32, [rounds, num_workers]. Standardised log-seconds.
        group: int, [num_workers]. The group of each worker.
        window: How many rounds a window has.
        size: How many windows a batch has.
        seed: Of the draws.
    """

    def __init__(
        self, times: np.ndarray, group: np.ndarray, window: int, size: int, seed: int
    ) -> None:
        self._times = times
        self._group = group
        self._window = np.arange(window)
        self._size = size
        self._random = np.random.default_rng(seed)

    def draw(self) -> np.ndarray:
        """Returns a batch, float32 [size, window, num_workers]."""
        last = len(self._times) - len(self._window)
        begins = self._random.integers(0, last + 1, self._size)
        if self._random.random() >= _SHUFFLED:
            return self._times[begins[:, None] + self._window]
        of_group = np.tile(begins[:, None], (1, self._group.max() + 1))
        begins = self._random.permuted(of_group, axis=0)[:, self._group]
        rounds = begins[:, None, :] + self._window[:, None]
        return np.take_along_axis(self._times, rounds.reshape(-1, rounds.shape[2]), axis=0).reshape(
            rounds.shape
        )
