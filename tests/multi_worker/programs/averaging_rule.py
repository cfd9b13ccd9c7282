"""Model averaging by the pure rule: every learner is a plain Keras model of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tf_syncdist.mixing import averaging

Batch = tuple[np.ndarray, ...]


class Reference:
    """Learners and their central model, without any strategy.

    Args:
        build: Makes a compiled model.
        weights: With which all begin.
        learners: How many there are.
        momentum: Of the central model.
        period: In every which run learners are averaged.
        correction: alpha; 1 / k by default.
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
        self.trained = [v.path for v in self.models[0].trainable_variables]
        self.central = [
            averaging.Central(np.array(w), np.zeros_like(w)) for w in self._read(self.models[0])
        ]
        self.momentum, self.period = momentum, period
        self.correction = correction or averaging.default_correction(learners)
        self.run = 0
        self.highest = 0.0

    @staticmethod
    def _read(model: keras.Model) -> list[np.ndarray]:
        return [v.numpy() for v in model.trainable_variables]

    @staticmethod
    def _write(model: keras.Model, values: Sequence[np.ndarray]) -> None:
        for variable, value in zip(model.trainable_variables, values, strict=True):
            variable.assign(value)

    def step(self, batches: Sequence[Batch]) -> None:
        """Does one run; each learner has a batch."""
        rate = float(keras.ops.convert_to_numpy(self.models[0].optimizer.learning_rate))
        if averaging.restarts(rate, self.highest):
            self.highest = rate
            for model in self.models:
                self._write(model, [c.model for c in self.central])
        self.highest = max(self.highest, rate)
        before = [self._read(m) for m in self.models]
        for model, batch in zip(self.models, batches, strict=True):
            model.train_on_batch(*batch)
        due, self.run = self.run % self.period == 0, self.run + 1
        if not due:
            return
        after = [self._read(m) for m in self.models]
        mixed: list[list[np.ndarray]] = [[] for _ in self.models]
        for number, central in enumerate(self.central):
            learners, self.central[number] = averaging.averaged(
                [w[number] for w in before],
                [a[number] - b[number] for a, b in zip(after, before, strict=True)],
                central,
                np.float32(self.correction),
                np.float32(self.momentum),
            )
            for values, value in zip(mixed, learners, strict=True):
                values.append(value)
        for model, values in zip(self.models, mixed, strict=True):
            self._write(model, values)

    def values(self) -> list[Any]:
        """Returns the central model's trained variables, as nested lists."""
        return [c.model.tolist() for c in self.central]


def dealt(batches: Sequence[Batch], workers: int, learners: int, runs: int) -> list[list[Batch]]:
    """Returns the batches of each run, of worker 0's learners first."""
    found = []
    for run in range(runs):
        numbers = [
            (run * learners + i) * workers + w for w in range(workers) for i in range(learners)
        ]
        found.append([batches[n % len(batches)] for n in numbers])
    return found
