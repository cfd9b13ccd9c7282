"""A process of benchmarks.mixing that trains with some learners, or with MirroredStrategy."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import keras
import tensorflow as tf

import tf_syncdist
from benchmarks import mixing_task
from benchmarks.mixing_settings import Settings
from examples.mnist_data import Dataset

# Batches of the fit in which everything is traced, and learners are tried.
_WARMUP_BATCHES = 16


class Task(NamedTuple):
    """What to train.

    Args:
        strategy: "model_averaging" or "mirrored".
        learners: Learners of the device, or "auto"; for the peer, how many times as large its batch
            is as that of a learner.
        devices: Logical CPU devices.
        seed: Seed of the weights and of the order of the data.
    """

    strategy: str
    learners: str
    devices: int
    seed: int


class _Tester(keras.callbacks.Callback):
    """Tests the model some times in each pass over the data, and ends training at the target.

    Args:
        judge: Tests it.
        settings: When to test, and when to stop.
        epochs_per_run: What share of the data a call of the training function takes.
    """

    def __init__(self, judge: mixing_task.Judge, settings: Settings, epochs_per_run: float) -> None:
        super().__init__()
        self.runs = 0
        self._judge = judge
        self._settings = settings
        self._epochs_per_run = epochs_per_run

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Starts the clock."""
        self.stopwatch = mixing_task.Stopwatch()
        self.tests = mixing_task.Tests(self._judge, self.stopwatch, self._settings)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Tests if it is time."""
        self.runs += 1
        epochs = self.runs * self._epochs_per_run
        if self.tests.are_due(epochs):
            self.model.stop_training = self.tests.stop(epochs, self.model.get_weights)


def train(task: Task, settings: Settings, data: Dataset) -> dict[str, Any]:
    """Trains a new model and returns what it came to.

    Args:
        task: What to train.
        settings: How.
        data: The data.
    """
    os.environ.pop("TF_CONFIG", None)
    tf.config.threading.set_intra_op_parallelism_threads(settings.op_threads)
    devices = _make_devices(task.devices)
    is_mirrored = task.strategy == "mirrored"
    batch_size = settings.batch_size * (int(task.learners) if is_mirrored else 1)
    # A smaller batch at the end of a pass would be traced within the time that is taken.
    whole = len(data.x_train) // batch_size * batch_size
    x, y = data.x_train[:whole], data.y_train[:whole]
    judge = mixing_task.Judge(data, settings)
    keras.utils.set_random_seed(task.seed)
    strategy = _make_strategy(task, devices, settings)
    with strategy.scope():
        model = mixing_task.build(x.shape[1:], settings)
        optimizer = keras.optimizers.SGD(settings.learning_rate, momentum=0.9)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, mixing_task.loss_function(), jit_compile=False)
    state = mixing_task.State(model, optimizer)
    options: dict[str, Any] = {"batch_size": batch_size, "verbose": 0}
    some = _WARMUP_BATCHES * batch_size
    began = time.perf_counter()
    model.fit(x[:some], y[:some], **options)
    warmup_seconds = time.perf_counter() - began
    state.restore()

    learners = int(task.learners) if is_mirrored else strategy.num_learners
    images_per_run = settings.batch_size * learners
    tester = _Tester(judge, settings, images_per_run / whole)
    model.fit(x, y, epochs=int(settings.epochs) + 1, callbacks=[tester], **options)
    rate = tester.runs / tester.stopwatch.seconds
    return {
        "seed": task.seed,
        "learners": learners,
        "warmup_seconds": warmup_seconds,
        "steps_per_second": rate,
        "examples_per_second": rate * images_per_run,
        **tester.tests.summary(),
    }


def _make_devices(number: int) -> list[str]:
    """Makes logical CPU devices, which is possible before TensorFlow starts only."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    configuration = [tf.config.LogicalDeviceConfiguration()] * number
    tf.config.set_logical_device_configuration(cpu, configuration)
    return [f"CPU:{index}" for index in range(number)]


def _make_strategy(task: Task, devices: list[str], settings: Settings) -> Any:
    if task.strategy == "mirrored":
        return tf.distribute.MirroredStrategy(devices)
    learners = "auto" if task.learners == "auto" else int(task.learners)
    return tf_syncdist.ModelAveragingStrategy(
        learners, central_momentum=settings.central_momentum, print_report=False
    )
