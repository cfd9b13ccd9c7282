"""Prediction by a deep Markov model, whose networks are evaluated in NumPy."""

import collections
from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff.normal import log_tail
from tf_syncdist.cutoff.planning import RoundTimes
from tf_syncdist.cutoff.predictors import Logs, log_score

_DRAWS = 100
_ROOT = np.float32(np.sqrt(2 * np.pi))

# Standard deviations in the latent space are no less than this.
LATENT_FLOOR = 0.01

# With so many workers a diagonal normal law cannot say that now and then a whole machine slows
# down; joint deviations of the last rounds can, once there are enough.
_LARGE = 500
_MEMORY = 200
_ENOUGH = 20


class Weights(NamedTuple):
    """A deep Markov model: what is learned of the latent state z and the standardised times x.

    All arrays are float32 unless they say otherwise. Matrices are applied from the right: x @ A.

    Args:
        scale: float64, [2]. Mean and deviation that standardise log-seconds.
        window: int64, []. How many rounds back the encoder looks.
        floor: float64, []. Standard deviations of standardised times are no less than this.
        start: [latent]. z before the first round of a window.
        read_times, read_state, read_bias: The gated recurrent unit that reads rounds.
        infer_in, infer_bias, infer_out, infer_out_bias: q(z | z before, unit's output).
        move_in, move_bias, move_out, move_out_bias: p(z | z before).
        emit_in, emit_bias: The hidden layer of p(x | z).
        mean_hidden, mean_latent, mean_bias: From it, and from z directly, the means of x.
        spread_hidden, spread_bias: The deviations of x; of one column if all workers share one.
    """

    scale: np.ndarray
    window: np.ndarray
    floor: np.ndarray
    start: np.ndarray
    read_times: np.ndarray
    read_state: np.ndarray
    read_bias: np.ndarray
    infer_in: np.ndarray
    infer_bias: np.ndarray
    infer_out: np.ndarray
    infer_out_bias: np.ndarray
    move_in: np.ndarray
    move_bias: np.ndarray
    move_out: np.ndarray
    move_out_bias: np.ndarray
    emit_in: np.ndarray
    emit_bias: np.ndarray
    mean_hidden: np.ndarray
    mean_latent: np.ndarray
    mean_bias: np.ndarray
    spread_hidden: np.ndarray
    spread_bias: np.ndarray


class Sizes(NamedTuple):
    """How large the networks are.

    Args:
        workers: Number of workers.
        latent: Dimensions of the latent state.
        unit: Of the recurrent unit's state.
        inference: Neurons in the hidden layer of inference,
        move: of the transition,
        emission: and of the emission.
        spreads: `workers`, or 1 if all share one deviation.
    """

    workers: int
    latent: int
    unit: int
    inference: int
    move: int
    emission: int
    spreads: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape that each of the `Weights` has."""
        return {
            "scale": (2,),
            "window": (),
            "floor": (),
            "start": (self.latent,),
            "read_times": (self.workers, 3 * self.unit),
            "read_state": (self.unit, 3 * self.unit),
            "read_bias": (3 * self.unit,),
            "infer_in": (self.latent + self.unit, self.inference),
            "infer_bias": (self.inference,),
            "infer_out": (self.inference, 2 * self.latent),
            "infer_out_bias": (2 * self.latent,),
            "move_in": (self.latent, self.move),
            "move_bias": (self.move,),
            "move_out": (self.move, 2 * self.latent),
            "move_out_bias": (2 * self.latent,),
            "emit_in": (self.latent, self.emission),
            "emit_bias": (self.emission,),
            "mean_hidden": (self.emission, self.workers),
            "mean_latent": (self.latent, self.workers),
            "mean_bias": (self.workers,),
            "spread_hidden": (self.emission, self.spreads),
            "spread_bias": (self.spreads,),
        }


class Network:
    """Infers the cluster's latent state from a window of rounds, and draws what comes next.

    z_t ~ N(z_{t-1} + f(z_{t-1}), ...) and x_t ~ N(g(z_t), ...), inferred by q(z_t | z_{t-1}, h_t)
    where h is a recurrent unit's output. The inferred means are followed through the window and
    100 draws are made at its end. Late workers' times are drawn from what was predicted for them,
    truncated to exceed the round's end, before the round enters the window.

    Args:
        weights: The model.
        seed: Of the draws.

    References:
        Teng, Wood, arXiv 1803.04209, for the use of the model; Krishnan, Shalit, Sontag:
        Structured inference networks for nonlinear state space models, arXiv 1609.09869.
    """

    def __init__(self, weights: Weights, seed: int = 0) -> None:
        self._weights = weights
        self._mean, self._deviation = (float(v) for v in weights.scale)
        self._random = np.random.default_rng(seed)
        self._num_workers = len(weights.mean_bias)
        latent = (_DRAWS, len(weights.start))
        self._inference_noise = self._random.standard_normal(latent, np.float32)
        self._move_noise = self._random.standard_normal(latent, np.float32)
        self._noise = self._random.standard_normal((_DRAWS, self._num_workers), np.float32)
        # What the recurrent unit needs of a round, so that each is multiplied only once.
        self._window: collections.deque[np.ndarray] = collections.deque(maxlen=int(weights.window))
        self._deviations = np.zeros((_MEMORY, self._num_workers), np.float32)
        self._count = 0
        self._means: np.ndarray | None = None
        self._spreads: np.ndarray | None = None

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over; rounds come in order."""
        logs = Logs(times)
        values = self._standardised(logs.values)
        if self._means is not None:
            self._impute(values, logs)
            if self._num_workers >= _LARGE:
                self._deviations[self._count % _MEMORY] = values - self._means.mean(axis=0)
                self._count += 1
        self._window.append(values @ self._weights.read_times + self._weights.read_bias)
        self._predict()

    def samples(self) -> np.ndarray:
        """Returns draws of the next round's times, float32 seconds, [draws, num_workers]."""
        if self._means is None:
            raise RuntimeError("Expected a round to be observed before the next is predicted.")
        kept = min(self._count, _MEMORY)
        if kept < _ENOUGH:
            drawn = self._noise * self._spreads
            drawn += self._means
        else:
            drawn = self._deviations[np.arange(_DRAWS) * max(kept, _DRAWS) // _DRAWS % kept]
            drawn += self._means.mean(axis=0)
        drawn *= np.float32(self._deviation)
        drawn += np.float32(self._mean)
        return np.exp(drawn, out=drawn)

    def log_score(self, times: RoundTimes) -> float:
        """Returns how likely a round is, before it is observed; see `Predictor`."""
        if self._means is None:
            return 0.0
        logs = Logs(times)
        values = self._standardised(logs.values)
        z = (values - self._means) / self._spreads
        late = log_tail(z[:, logs.late])
        z *= z
        z *= np.float32(-0.5)
        density = np.exp(z, out=z)
        density /= self._spreads * (_ROOT * np.float32(self._deviation))
        return log_score(logs, density.mean(axis=0), np.exp(late).mean(axis=0))

    def _standardised(self, log_seconds: np.ndarray) -> np.ndarray:
        return ((log_seconds - self._mean) / self._deviation).astype(np.float32)

    def _impute(self, values: np.ndarray, logs: Logs) -> None:
        """Draws late workers' times from what was predicted, given that they are late."""
        absent = ~logs.seen
        absent[logs.late] = False
        values[absent] = self._means[:, absent].mean(axis=0)
        late = logs.late
        if not len(late):
            return
        spreads = np.broadcast_to(self._spreads, self._means.shape)[:, late]
        drawn = self._means[:, late] + spreads * self._noise[:, late]
        chance = (drawn > values[late]) * self._random.random(drawn.shape, np.float32)
        picked = drawn[chance.argmax(axis=0), np.arange(len(late))]
        # Where no draw is late, the model did not expect it at all; it is late by a little.
        little = np.abs(self._random.standard_normal(len(late), np.float32))
        barely = values[late] + little * np.float32(self._weights.floor)
        values[late] = np.where(chance.any(axis=0), picked, barely)

    def _predict(self) -> None:
        w = self._weights
        size = len(w.read_state)
        state, z = np.zeros(size, np.float32), w.start
        spread = np.zeros_like(z)
        for read in self._window:
            kept = state @ w.read_state
            gates = _sigmoid(read[: 2 * size] + kept[: 2 * size])
            new = np.tanh(read[2 * size :] + gates[size:] * kept[2 * size :])
            state = gates[:size] * state + (1 - gates[:size]) * new
            z, spread = self._infer(z, state)
        drawn = z + spread * self._inference_noise
        change = np.tanh(drawn @ w.move_in + w.move_bias) @ w.move_out + w.move_out_bias
        moved, spread = _mean_and_spread(drawn, change)
        moved += spread * self._move_noise
        hidden = np.tanh(moved @ w.emit_in + w.emit_bias)
        self._means = hidden @ w.mean_hidden + moved @ w.mean_latent + w.mean_bias
        self._spreads = _softplus(hidden @ w.spread_hidden + w.spread_bias) + np.float32(w.floor)

    def _infer(self, z: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w = self._weights
        hidden = np.tanh(np.concatenate((z, state)) @ w.infer_in + w.infer_bias)
        return _mean_and_spread(z, hidden @ w.infer_out + w.infer_out_bias)


def _mean_and_spread(z: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    latent = z.shape[-1]
    spread = _softplus(change[..., latent:]) + np.float32(LATENT_FLOOR)
    return z + change[..., :latent], spread


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + 1)
