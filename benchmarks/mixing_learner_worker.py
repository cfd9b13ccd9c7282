"""One process of benchmarks.mixing: trains with some learners, or with MirroredStrategy.

It reads a seed from each line of its input, trains anew, and answers with a line of JSON. A line
"ready" is answered when it is.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from typing import Any

import keras
import tensorflow as tf
from absl import app, flags

from benchmarks import mixing_task
from examples.mnist_data import Dataset

_SYSTEM = flags.DEFINE_enum("system", "learners", ["learners", "mirrored"], "The strategy.")
_LEARNERS = flags.DEFINE_string("learners", "1", "learners_per_device.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Logical CPU devices.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "The batch size that `fit` is given.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.02, "Of SGD with momentum 0.9.")
_TARGET = flags.DEFINE_float("target", 0.97, "Test accuracy at which training ends.")
_EPOCHS = flags.DEFINE_float("epochs", 10, "Passes over the data after which it ends.")
_TESTS = flags.DEFINE_integer("tests_per_epoch", 4, "How often to test the model.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of MNIST's IDX files.")
_GIVE_UP_AT = flags.DEFINE_float("give_up_at", None, "time.time() of the end.", required=True)

# Batches of the fit in which everything is traced, and learners are tried.
_WARMUP_BATCHES = 16


class _Tester(keras.callbacks.Callback):
    """Tests the model some times in each pass over the data, and ends training at the target.

    Args:
        judge: Tests it.
        images_per_run: How many images a call of the training function takes.
        images: How many there are in all.
    """

    def __init__(self, judge: mixing_task.Judge, images_per_run: int, images: int) -> None:
        super().__init__()
        self.runs = 0
        self._judge = judge
        self._epochs_per_run = images_per_run / images
        self._next_test = 1 / _TESTS.value

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Starts the clock."""
        self.stopwatch = mixing_task.Stopwatch()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Tests if it is time."""
        self.runs += 1
        epochs = self.runs * self._epochs_per_run
        if epochs < self._next_test:
            return
        self._next_test += 1 / _TESTS.value
        accuracy = self.stopwatch.test(
            epochs, lambda: self._judge.accuracy(self.model.get_weights())
        )
        self.model.stop_training = accuracy >= _TARGET.value or epochs >= _EPOCHS.value


def _make_devices() -> list[str]:
    """Makes logical CPU devices, which is possible before TensorFlow starts only."""
    configuration = [tf.config.LogicalDeviceConfiguration()] * _DEVICES.value
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, configuration)
    return [f"CPU:{number}" for number in range(_DEVICES.value)]


def _make_strategy(devices: list[str]) -> tf.distribute.Strategy:
    if _SYSTEM.value == "mirrored":
        return tf.distribute.MirroredStrategy(devices)
    # Not at the top: the peer has to run where tf_syncdist cannot be imported.
    import tf_syncdist

    learners = _LEARNERS.value
    return tf_syncdist.ModelAveragingStrategy(
        learners if learners == "auto" else int(learners), print_report=False
    )


def _train(seed: int, data: Dataset, judge: mixing_task.Judge, devices: list[str]) -> dict:
    """Trains a new model and returns what it came to."""
    keras.utils.set_random_seed(seed)
    strategy = _make_strategy(devices)
    with strategy.scope():
        model = mixing_task.build(data.x_train.shape[1:])
        optimizer = keras.optimizers.SGD(_LEARNING_RATE.value, momentum=0.9)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, mixing_task.loss_function(), jit_compile=False)
    state = mixing_task.State(model, optimizer)
    options: dict[str, Any] = {"batch_size": _BATCH_SIZE.value, "verbose": 0}
    some = _WARMUP_BATCHES * _BATCH_SIZE.value
    began = time.perf_counter()
    model.fit(data.x_train[:some], data.y_train[:some], **options)
    warmup_seconds = time.perf_counter() - began
    state.restore()

    learners = getattr(strategy, "num_learners", strategy.num_replicas_in_sync)
    batches = learners if _SYSTEM.value == "learners" else 1
    tester = _Tester(judge, batches * _BATCH_SIZE.value, len(data.x_train))
    epochs = int(_EPOCHS.value) + 1
    model.fit(data.x_train, data.y_train, epochs=epochs, callbacks=[tester], **options)
    seconds = tester.stopwatch.seconds
    return {
        "seed": seed,
        "learners": learners,
        "warmup_seconds": warmup_seconds,
        "examples_per_second": tester.runs * batches * _BATCH_SIZE.value / seconds,
        **mixing_task.summary(tester.stopwatch.curve, _TARGET.value, seconds, tester.runs),
    }


def main(argv: list[str]) -> None:
    """Trains whenever it is told to, until the input ends."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    faulthandler.dump_traceback_later(max(0.1, _GIVE_UP_AT.value - time.time()), exit=True)
    os.environ.pop("TF_CONFIG", None)
    devices = _make_devices()
    data = mixing_task.load(_DATA_DIR.value)
    # A smaller batch at the end of a pass would be traced within the time that is taken.
    whole = len(data.x_train) // _BATCH_SIZE.value * _BATCH_SIZE.value
    data = data._replace(x_train=data.x_train[:whole], y_train=data.y_train[:whole])
    judge = mixing_task.Judge(data)
    for line in sys.stdin:
        # Whoever asks whether it is ready does not want it to compute while others do.
        ready = line.strip() == "ready"
        print(json.dumps({} if ready else _train(int(line), data, judge, devices)), flush=True)


if __name__ == "__main__":
    app.run(main)
