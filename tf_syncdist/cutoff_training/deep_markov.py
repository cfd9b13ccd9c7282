"""The deep Markov model as a TensorFlow graph; `tf_syncdist.cutoff.network` evaluates the same."""

import math

import numpy as np
import tensorflow as tf

from tf_syncdist.cutoff.network import LATENT_FLOOR, Sizes, Weights

# Not trained.
_FIXED = ("scale", "window", "floor")

# Deviations begin small in the latent space: softplus(-1) = 0.31.
_FIRST_SPREAD = -1.0


class DeepMarkov:
    """The model's variables, and its evidence lower bound.

    Args:
        sizes: How large the networks are.
        window: How many rounds a window has.
        floor: Standard deviations of standardised times are no less than this.
        seed: Of the first values.

    References:
        Krishnan, Shalit, Sontag: Structured inference networks for nonlinear state space models,
        arXiv 1609.09869, equation 6 for the bound; Kingma, Welling: Auto-encoding variational
        Bayes, arXiv 1312.6114, section 2.4 for its gradient.
    """

    def __init__(self, sizes: Sizes, window: int, floor: float, seed: int) -> None:
        self._sizes = sizes
        self._window = window
        self._floor = floor
        random = np.random.default_rng(seed)
        self._variables = {
            name: tf.Variable(_first(name, shape, random), name=name)
            for name, shape in sizes.shapes().items()
            if name not in _FIXED
        }

    @property
    def variables(self) -> list[tf.Variable]:
        """What is trained."""
        return list(self._variables.values())

    def values(self) -> dict[str, np.ndarray]:
        """Returns a copy of what was trained, by name."""
        return {name: variable.numpy() for name, variable in self._variables.items()}

    def weights(self, values: dict[str, np.ndarray], mean: float, deviation: float) -> Weights:
        """Returns the model as NumPy evaluates it.

        Args:
            values: What was trained, as `values` gave it.
            mean: With which log-seconds were standardised,
            deviation: and this.
        """
        fixed = {
            "scale": np.array([mean, deviation]),
            "window": np.array(self._window),
            "floor": np.array(self._floor),
        }
        return Weights(**fixed, **values)

    def bound(self, times: tf.Tensor, noise: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns both parts of the evidence lower bound, means per round.

        Args:
            times: float32, [batch, window, workers]. Standardised log-seconds.
            noise: float32, [batch, window, latent]. Standard normal.

        Returns:
            E[log p(x | z)] and KL(q(z | ...) || p(z | ...)), which is to be subtracted.
        """
        v, latent = self._variables, self._sizes.latent
        batch = tf.shape(times)[0]
        flat = tf.reshape(times, [-1, self._sizes.workers])
        read = tf.reshape(flat @ v["read_times"] + v["read_bias"], [batch, self._window, -1])
        state = tf.zeros([batch, self._sizes.unit])
        z = tf.tile(v["start"][None], [batch, 1])
        path, divergence = [], 0.0
        for t in range(self._window):
            state = self._read(read[:, t], state)
            prior, prior_spread = self._move(z)
            z, spread = self._infer(z, state)
            ratio = (tf.square(spread) + tf.square(z - prior)) / (2 * tf.square(prior_spread))
            divergence += tf.reduce_sum(tf.math.log(prior_spread / spread) + ratio - 0.5, axis=1)
            z += spread * noise[:, t]
            path.append(z)
        likelihood = self._likelihood(flat, tf.reshape(tf.stack(path, axis=1), [-1, latent]))
        return tf.reduce_mean(likelihood), tf.reduce_mean(divergence) / self._window

    def _read(self, read: tf.Tensor, state: tf.Tensor) -> tf.Tensor:
        size = self._sizes.unit
        kept = state @ self._variables["read_state"]
        gates = tf.sigmoid(read[:, : 2 * size] + kept[:, : 2 * size])
        new = tf.tanh(read[:, 2 * size :] + gates[:, size:] * kept[:, 2 * size :])
        return gates[:, :size] * state + (1 - gates[:, :size]) * new

    def _infer(self, z: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        v = self._variables
        hidden = tf.tanh(tf.concat([z, state], axis=1) @ v["infer_in"] + v["infer_bias"])
        return self._split(z, hidden @ v["infer_out"] + v["infer_out_bias"])

    def _move(self, z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        v = self._variables
        hidden = tf.tanh(z @ v["move_in"] + v["move_bias"])
        return self._split(z, hidden @ v["move_out"] + v["move_out_bias"])

    def _split(self, z: tf.Tensor, change: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        latent = self._sizes.latent
        return z + change[:, :latent], tf.nn.softplus(change[:, latent:]) + LATENT_FLOOR

    def _likelihood(self, times: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        v = self._variables
        hidden = tf.tanh(z @ v["emit_in"] + v["emit_bias"])
        mean = hidden @ v["mean_hidden"] + z @ v["mean_latent"] + v["mean_bias"]
        spread = tf.nn.softplus(hidden @ v["spread_hidden"] + v["spread_bias"]) + self._floor
        log_spread = tf.math.log(spread) * (self._sizes.workers / self._sizes.spreads)
        squares = tf.reduce_sum(tf.square((times - mean) / spread), axis=1)
        constant = self._sizes.workers * 0.5 * math.log(2 * math.pi)
        return -0.5 * squares - tf.reduce_sum(log_spread, axis=1) - constant


def _first(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Returns a variable's first value, as Glorot and Bengio have it but for the deviations."""
    if len(shape) == 2:
        gain = {"move_out": 0.5, "spread_hidden": 0.1}.get(name, 1.0)
        return gain * math.sqrt(2 / sum(shape)) * random.standard_normal(shape, np.float32)
    value = np.zeros(shape, np.float32)
    if name in ("infer_out_bias", "move_out_bias"):
        value[shape[0] // 2 :] = _FIRST_SPREAD
    return value
