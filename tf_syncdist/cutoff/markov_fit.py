"""How hidden Markov chains are learned from a trace."""

import numpy as np

from tf_syncdist.cutoff import groups
from tf_syncdist.cutoff.markov import Chains

_ITERATIONS = 15

# What groups have in common weighs as much as so many rounds of a group: one that was never slow
# is taken to become so by the factor, and as rarely, as others do.
_COMMON_ROUNDS = 2.0
_COMMON_TRANSITIONS = np.array([[0.97, 0.03], [0.03, 0.97]])

_LEAST_DEVIATION = 1e-3
_TINY = 1e-30


def fit(log_seconds: np.ndarray, seen: np.ndarray) -> Chains:
    """Finds the chains of greatest likelihood by expectation and maximisation.

    Args:
        log_seconds: float, [rounds, num_workers]; imputed where a worker was late or absent.
        seen: bool, [rounds, num_workers]. Where it was neither. Imputed values help to tell the
            state; what a state is like is learned from the others.

    References:
        Rabiner: A tutorial on hidden Markov models, Proc. IEEE 77, 1989, section III C.
    """
    values = np.asarray(log_seconds, np.float32)
    group = groups.learned(values)
    member = groups.membership(group)
    slow = _first_guess(values @ member / member.sum(axis=0))
    transitions = np.tile(_COMMON_TRANSITIONS, (member.shape[1], 1, 1))
    weights = seen.astype(np.float32)
    for _ in range(_ITERATIONS):
        means, deviations = _emissions(values, weights, slow, group, member)
        evidence = _evidence(values, means, deviations, member)
        slow, transitions = _smoothed(evidence, transitions)
    occupancy = np.stack((1 - slow.mean(axis=0), slow.mean(axis=0)), axis=1).astype(np.float64)
    return Chains(group, means, deviations, transitions, occupancy)


def _first_guess(means: np.ndarray) -> np.ndarray:
    """Returns which groups are slow when, float32 [rounds, groups], from their means."""
    low, high = np.percentile(means, (2, 98), axis=0)
    span = high - low
    # Where others change much more, this one was never slow.
    changes = span > 0.5 * span.max()
    return ((means > (low + high) / 2) & changes).astype(np.float32)


def _emissions(
    values: np.ndarray,
    weights: np.ndarray,
    slow: np.ndarray,
    group: np.ndarray,
    member: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns means and deviations, each [num_workers, 2]."""
    of_worker = slow[:, group] * weights
    rounds = np.stack((weights.sum(axis=0) - of_worker.sum(axis=0), of_worker.sum(axis=0)))
    sums = np.stack(((values * weights).sum(axis=0), (values * of_worker).sum(axis=0)))
    sums[0] -= sums[1]
    normal, slower = sums / np.maximum(rounds, 1e-3)
    both = rounds.min(axis=0)
    step = ((slower - normal) * both).sum() / max(both.sum(), 1e-3)
    # Whichever state a worker was hardly seen in, the other one says where it is.
    mean = np.empty((2, len(group)))
    mean[0] = (sums[0] + _COMMON_ROUNDS * (slower - step)) / (rounds[0] + _COMMON_ROUNDS)
    mean[0] = np.where(rounds[1] > rounds[0], mean[0], normal)
    mean[1] = (sums[1] + _COMMON_ROUNDS * (mean[0] + step)) / (rounds[1] + _COMMON_ROUNDS)
    squares = np.stack(
        (
            ((values - mean[0].astype(np.float32)) ** 2 * (weights - of_worker)).sum(axis=0),
            ((values - mean[1].astype(np.float32)) ** 2 * of_worker).sum(axis=0),
        )
    )
    common = squares.sum(axis=1, keepdims=True) / np.maximum(
        rounds.sum(axis=1, keepdims=True), 1e-3
    )
    total = squares @ member + _COMMON_ROUNDS * common
    variance = total / (rounds @ member + _COMMON_ROUNDS)
    deviation = np.sqrt(np.maximum(variance, _LEAST_DEVIATION**2))
    return mean.T, deviation[:, group].T


def _evidence(
    values: np.ndarray, means: np.ndarray, deviations: np.ndarray, member: np.ndarray
) -> np.ndarray:
    """Returns the likelihood of each group's states, up to a factor, [rounds, groups, 2]."""
    logs = []
    for mean, deviation in zip(means.T, deviations.T, strict=True):
        z = (values - mean.astype(np.float32)) / deviation.astype(np.float32)
        logs.append((-0.5 * z * z - np.log(deviation).astype(np.float32)) @ member)
    both = np.stack(logs, axis=2).astype(np.float64)
    return np.exp(both - both.max(axis=2, keepdims=True))


def _smoothed(evidence: np.ndarray, transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Goes forward and backward through all rounds.

    Returns:
        The probabilities to be slow, float32 [rounds, groups], and new transitions.
    """
    num_rounds = len(evidence)
    forward = np.empty_like(evidence)
    state = np.full(evidence.shape[1:], 0.5)
    for t in range(num_rounds):
        if t:
            state = np.einsum("gi,gij->gj", state, transitions)
        state = state * evidence[t] + _TINY
        state /= state.sum(axis=1, keepdims=True)
        forward[t] = state
    slow = np.empty(evidence.shape[:2], np.float32)
    slow[-1] = forward[-1][:, 1]
    went = np.zeros_like(transitions)
    later = np.ones(evidence.shape[1:])
    for t in range(num_rounds - 2, -1, -1):
        ahead = evidence[t + 1] * later
        step = forward[t][:, :, None] * transitions * ahead[:, None, :]
        went += step / (step.sum(axis=(1, 2), keepdims=True) + _TINY)
        later = np.einsum("gij,gj->gi", transitions, ahead)
        later /= later.sum(axis=1, keepdims=True) + _TINY
        both = forward[t] * later
        slow[t] = both[:, 1] / (both.sum(axis=1) + _TINY)
    went += _COMMON_ROUNDS * _COMMON_TRANSITIONS
    return slow, went / went.sum(axis=2, keepdims=True)
