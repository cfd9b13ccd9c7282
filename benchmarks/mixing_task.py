"""What the processes of benchmarks.mixing learn, and how they take the time of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.mixing_settings import Settings
from examples.mnist_data import NUM_CLASSES, Dataset, load_digits, load_mnist


def load(data_dir: str | None) -> Dataset:
    """Returns MNIST from a directory of its IDX files, or scikit-learn's 8x8 digits without one."""
    return load_mnist(data_dir) if data_dir else load_digits()


def build(image_shape: Sequence[int], settings: Settings) -> keras.Model:
    """Builds a small convolutional network for images of one colour."""
    layers: list[Any] = [keras.Input(image_shape), keras.layers.Reshape((*image_shape, 1))]
    for filters in settings.filters:
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
        settings: What the model is like.
    """

    def __init__(self, data: Dataset, settings: Settings) -> None:
        self._model = build(data.x_train.shape[1:], settings)
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
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begin = clock()
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        """How long training has gone on."""
        return self._clock() - self._begin - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stands still for a while."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began


class Tests:
    """Tests a model some times in each pass over the data, and says when to stop.

    Args:
        judge: Tests it.
        stopwatch: Stands still meanwhile.
        settings: When to test, and when to stop.

    Attributes:
        curve: Seconds, passes over the data, and accuracy, of every test.
    """

    def __init__(self, judge: Judge, stopwatch: Stopwatch, settings: Settings) -> None:
        self.curve: list[tuple[float, float, float]] = []
        self._judge = judge
        self._stopwatch = stopwatch
        self._settings = settings

    def are_due(self, epochs: float) -> bool:
        """Returns whether it is time after so many passes over the data."""
        if self._stopwatch.seconds >= self._settings.most_seconds:
            return True
        last = self.curve[-1][1] if self.curve else 0.0
        per_epoch = self._settings.tests_per_epoch
        return int(epochs * per_epoch) > int(last * per_epoch)

    def stop(self, epochs: float, weights: Callable[[], Sequence[np.ndarray]]) -> bool:
        """Tests the weights, and returns whether the run is over."""
        seconds = self._stopwatch.seconds
        with self._stopwatch.pause():
            accuracy = self._judge.accuracy(weights())
        self.curve.append((seconds, epochs, accuracy))
        wanted = self._settings
        is_late = epochs >= wanted.epochs or seconds >= wanted.most_seconds
        return accuracy >= wanted.target or is_late

    def summary(self) -> dict[str, Any]:
        """Returns what the run came to."""
        points = ((s, e) for s, e, accuracy in self.curve if accuracy >= self._settings.target)
        seconds, epochs = next(points, (None, None))
        return {
            "seconds_to_target": seconds,
            "epochs_to_target": epochs,
            "final_accuracy": self.curve[-1][2] if self.curve else 0.0,
            "curve": self.curve,
        }
