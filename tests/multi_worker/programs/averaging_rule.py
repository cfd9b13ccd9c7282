"""Model averaging by the pure rule: every learner is a plain Keras model of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_syncdist.mixing import averaging

Batch = tuple[np.ndarray, ...]


class Reference:
    """Learners and their central model, without any strategy and without a graph.

    Args:
        build: Makes a compiled model.
        weights: With which all begin.
        learners: How many there are.
        momentum: Of the central model.
        period: In every which run learners are averaged.
        correction: alpha; 1 / k by default.

    Attributes:
        models: What the learners are.
    """

    def __init__(
        self,
        build: Callable[[], keras.Model],
        weights: Sequence[np.ndarray],
        learners: int,
        momentum: float = 0.9,
        period: int = 1,
        correction: float | None = None,
    ) -> None:
        self.models = [build() for _ in range(learners)]
        for model in self.models:
            model.set_weights(weights)
        self._central = [averaging.Central(w, np.zeros_like(w)) for w in self._read(self.models[0])]
        self._momentum, self._period = momentum, period
        self._correction = correction or averaging.default_correction(learners)
        self._run = 0
        self._highest = 0.0

    def step(self, batches: Sequence[Batch], rate: float | None = None) -> list[list[np.ndarray]]:
        """Does one run; each learner has a batch.

        Args:
            batches: What each learner is given: x, y and perhaps weights of examples.
            rate: The learning rate, if it is not what the optimizers say.

        Returns:
            What each learner's trained variables were where its step began.
        """
        for model in self.models:
            if rate is not None:
                model.optimizer.learning_rate = rate
        rate = float(keras.ops.convert_to_numpy(self.models[0].optimizer.learning_rate))
        if averaging.restarts(rate, self._highest):
            self._highest = rate
            for model in self.models:
                self._write(model, self.central())
        self._highest = max(self._highest, rate)
        before = [self._read(m) for m in self.models]
        for model, batch in zip(self.models, batches, strict=True):
            _step(model, *batch)
        due, self._run = self._run % self._period == 0, self._run + 1
        # One learner in all has nobody to be averaged with.
        if due and len(self.models) > 1:
            self._average(before)
        return before

    def _average(self, before: list[list[np.ndarray]]) -> None:
        after = [self._read(m) for m in self.models]
        mixed: list[list[np.ndarray]] = [[] for _ in self.models]
        for number, central in enumerate(self._central):
            learners, self._central[number] = averaging.averaged(
                [b[number] for b in before],
                [a[number] - b[number] for a, b in zip(after, before, strict=True)],
                central,
                np.float32(self._correction),
                np.float32(self._momentum),
            )
            for values, value in zip(mixed, learners, strict=True):
                values.append(value)
        for model, values in zip(self.models, mixed, strict=True):
            self._write(model, values)

    def central(self) -> list[np.ndarray]:
        """Returns the central model's trained variables."""
        if len(self.models) == 1:
            return self._read(self.models[0])
        return [c.model for c in self._central]

    @staticmethod
    def _read(model: keras.Model) -> list[np.ndarray]:
        return [np.array(v.numpy()) for v in model.trainable_variables]

    @staticmethod
    def _write(model: keras.Model, values: Sequence[np.ndarray]) -> None:
        for variable, value in zip(model.trainable_variables, values, strict=True):
            variable.assign(value)


def _step(model: keras.Model, x: Any, y: Any, weight: np.ndarray | None = None) -> None:
    x, y = tf.nest.map_structure(tf.constant, (x, y))
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True), weight, training=True)
        loss = model.optimizer.scale_loss(loss)
    gradients = tape.gradient(loss, model.trainable_variables)
    model.optimizer.apply(gradients, model.trainable_variables)


def dealt(batches: Sequence[Batch], workers: int, learners: int, runs: int) -> list[list[Batch]]:
    """Returns the batches of each run, of worker 0's learners first."""
    found = []
    for run in range(runs):
        numbers = [
            (run * learners + i) * workers + w for w in range(workers) for i in range(learners)
        ]
        found.append([batches[n % len(batches)] for n in numbers])
    return found
