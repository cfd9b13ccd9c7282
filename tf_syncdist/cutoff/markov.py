"""Prediction by hidden Markov chains: each group of workers is in its normal or in a slow state."""

from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff.normal import log_tail
from tf_syncdist.cutoff.planning import RoundTimes
from tf_syncdist.cutoff.predictors import Logs, log_score

_DRAWS = 100

# No worker says more than this for or against a state, whatever strange time it takes.
_MOST_EVIDENCE = 8.0
_MOST_EVIDENCE_OF_GROUP = 50.0


class Chains(NamedTuple):
    """What is learned: one chain per group, and what each worker does in each of its states.

    Args:
        group: int64, [num_workers]. The group of each worker.
        means: float64, [num_workers, 2]. Of the log-seconds in the normal and in the slow state.
        deviations: float64, [num_workers, 2].
        transitions: float64, [groups, 2, 2]. The probability to go from a state to a state.
        occupancy: float64, [groups, 2]. How often a group is in which state.
    """

    group: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    transitions: np.ndarray
    occupancy: np.ndarray


class Markov:
    """Filters the states of the groups, and draws what comes next.

    Late workers tell by being late. All workers of a group change together in a draw, so draws know
    how likely it is that a whole machine slows down.

    Args:
        chains: The model.
        seed: Of the draws.

    References:
        Rabiner: A tutorial on hidden Markov models, Proc. IEEE 77, 1989, section III A.
    """

    def __init__(self, chains: Chains, seed: int = 0) -> None:
        self._chains = chains
        random = np.random.default_rng(seed)
        num_groups, num_workers = len(chains.transitions), len(chains.group)
        self._order = np.argsort(chains.group, kind="stable")
        self._begins = np.searchsorted(chains.group[self._order], np.arange(num_groups))
        self._dice = random.random((_DRAWS, num_groups))
        self._noise = random.standard_normal((_DRAWS, num_workers), np.float32)
        self._normal_mean, self._slow_mean = chains.means.T.astype(np.float32)
        self._normal_deviation, self._slow_deviation = chains.deviations.T.astype(np.float32)
        self._log_deviations = np.log(chains.deviations)
        self._next = chains.occupancy

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over; rounds come in order."""
        logs = Logs(times)
        z = (logs.values[:, None] - self._chains.means) / self._chains.deviations
        evidence = np.where(logs.seen[:, None], -0.5 * z * z - self._log_deviations, 0.0)
        evidence[logs.late] = log_tail(z[logs.late])
        evidence = np.maximum(evidence, evidence.max(axis=1, keepdims=True) - _MOST_EVIDENCE)
        together = np.add.reduceat(evidence[self._order], self._begins, axis=0)
        together -= together.max(axis=1, keepdims=True)
        state = self._next * np.exp(np.maximum(together, -_MOST_EVIDENCE_OF_GROUP))
        state /= state.sum(axis=1, keepdims=True)
        self._next = np.einsum("gi,gij->gj", state, self._chains.transitions)

    def samples(self) -> np.ndarray:
        """Returns draws of the next round's times, float32 seconds, [draws, num_workers]."""
        slow = (self._dice < self._next[:, 1])[:, self._chains.group]
        drawn = np.where(slow, self._slow_deviation, self._normal_deviation)
        drawn *= self._noise
        drawn += np.where(slow, self._slow_mean, self._normal_mean)
        return np.exp(drawn, out=drawn)

    def log_score(self, times: RoundTimes) -> float:
        """Returns how likely a round is, before it is observed; see `Predictor`."""
        logs = Logs(times)
        z = (logs.values[:, None] - self._chains.means) / self._chains.deviations
        weights = self._next[self._chains.group]
        scale = weights / (self._chains.deviations * np.sqrt(2 * np.pi))
        density = (scale * np.exp(-0.5 * z * z)).sum(axis=1)
        tails = (weights[logs.late] * np.exp(log_tail(z[logs.late]))).sum(axis=1)
        return log_score(logs, density, tails)
