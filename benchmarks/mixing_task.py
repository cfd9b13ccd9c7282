"""What the processes of benchmarks.mixing learn, and how they take the time of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from examples.mnist_data import NUM_CLASSES, Dataset, load_digits, load_mnist

_FILTERS = (8, 16)


def load(data_dir: str | None) -> Dataset:
    """Returns MNIST from a directory of its IDX files, or scikit-learn's 8x8 digits without one."""
    return load_mnist(data_dir) if data_dir else load_digits()


def build(image_shape: Sequence[int]) -> keras.Model:
    """Builds a small convolutional network, so small that a batch of 16 does not fill a device."""
    layers: list[Any] = [keras.Input(image_shape), keras.layers.Reshape((*image_shape, 1))]
    for filters in _FILTERS:
        layers.append(keras.layers.Conv2D(filters, 3, padding="same", activation="relu"))
        layers.append(keras.layers.MaxPooling2D())
    return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)])


def loss_function() -> keras.losses.Loss:
    """Returns the loss of the network's logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class State:
    """The values with which a model and its optimizer begin.

    Args:
        model: The model; its optimizer is built.
        optimizer: The optimizer.
    """

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        self._variables = [*model.variables, *optimizer.variables]
        self._values = [v.numpy() for v in self._variables]

    def restore(self) -> None:
        """Gives everything the value that it began with."""
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)


class Judge:
    """Tests weights in a model of its own, which no strategy knows.

    Make it outside of a strategy's scope.

    Args:
        data: The data.
    """

    def __init__(self, data: Dataset) -> None:
        self._model = build(data.x_train.shape[1:])
        self._images, self._labels = tf.constant(data.x_test), data.y_test
        self._predict = tf.function(self._model)

    def accuracy(self, weights: Sequence[np.ndarray]) -> float:
        """Returns the share of the test images that a model with these weights recognizes."""
        self._model.set_weights(weights)
        found = np.argmax(self._predict(self._images), axis=-1)
        return float(np.mean(found == self._labels))


class Stopwatch:
    """The clock of a training run, which stands still while the model is tested.

    Args:
        clock: Returns the time in seconds; monotonic.

    Attributes:
        curve: Seconds, passes over the data, and accuracy, of every test.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.curve: list[tuple[float, float, float]] = []
        self._clock = clock
        self._begin = clock()
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        """How long training has gone on."""
        return self._clock() - self._begin - self._paused

    def test(self, epochs: float, test: Callable[[], float]) -> float:
        """Tests the model while the clock stands still, and returns its accuracy.

        Args:
            epochs: How many passes over the data there have been.
            test: Returns the accuracy.
        """
        began, seconds = self._clock(), self.seconds
        accuracy = test()
        self.curve.append((seconds, epochs, accuracy))
        self._paused += self._clock() - began
        return accuracy


def summary(
    curve: Sequence[tuple[float, float, float]], target: float, seconds: float, steps: int
) -> dict[str, Any]:
    """Returns what one training run came to.

    Args:
        curve: Seconds, passes over the data, and accuracy, of every test.
        target: The accuracy to be reached.
        seconds: How long it took.
        steps: How many steps were taken.
    """
    reached = next(((s, e) for s, e, accuracy in curve if accuracy >= target), (None, None))
    return {
        "seconds_to_target": reached[0],
        "epochs_to_target": reached[1],
        "steps_per_second": steps / seconds,
        "final_accuracy": curve[-1][2],
        "curve": [list(point) for point in curve],
    }
