"""One process of benchmarks.mixing: trains a small CNN on MNIST until it is good enough.

It prints one line of JSON for each seed.
"""

from __future__ import annotations

import json
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_syncdist
from examples.mnist_data import Dataset, load_mnist

_SYSTEM = flags.DEFINE_enum("system", "sma", ["plain", "sma", "mirrored"], "What trains.")
_LEARNERS = flags.DEFINE_string("learners", "1", 'Learners per device, devices, or "auto".')
_BATCH = flags.DEFINE_integer("batch_size", 16, "Of a learner.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of MNIST's IDX files.")
_TARGET = flags.DEFINE_float("target", 0.97, "Test accuracy at which the clock stops.")
_EPOCHS = flags.DEFINE_integer("max_epochs", 8, "Where training gives up.")
_PARTS = flags.DEFINE_integer("parts", 8, "How often an epoch is tested.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "One training for each.")
_RATE = flags.DEFINE_float("learning_rate", 0.02, "Of SGD with momentum 0.9.")


class _Clock(keras.callbacks.Callback):
    """Tests several times an epoch, and takes the time without the tests."""

    def __init__(self, data: Dataset, runs_per_epoch: int) -> None:
        super().__init__()
        self.curve: list[tuple[float, float, float]] = []
        self.tested_seconds = 0.0
        self._images, self._labels = tf.constant(data.x_test), data.y_test
        self._runs_per_epoch = runs_per_epoch
        self._runs = 0
        self._tests = 0
        self._predict = tf.function(lambda images: self.model(images, training=False))

    def start(self, model: keras.Model) -> None:
        """Takes the time from here on; what is traced for testing is not part of it."""
        self.set_model(model)
        self.accuracy()
        self.began = time.perf_counter()

    def accuracy(self) -> float:
        """Returns the test accuracy."""
        return float(np.mean(np.argmax(self._predict(self._images), 1) == self._labels))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self._runs += 1
        epochs = self._runs / self._runs_per_epoch
        if epochs * _PARTS.value < self._tests + 1:
            return
        self._tests += 1
        begin = time.perf_counter()
        accuracy = self.accuracy()
        now = time.perf_counter()
        self.curve.append((begin - self.began - self.tested_seconds, epochs, accuracy))
        self.tested_seconds += now - begin
        if accuracy >= _TARGET.value:
            self.model.stop_training = True


def _model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Reshape((28, 28, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.SGD(_RATE.value, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def _strategy() -> tf.distribute.Strategy:
    if _SYSTEM.value == "plain":
        return tf.distribute.get_strategy()
    if _SYSTEM.value == "mirrored":
        devices = [d.name for d in tf.config.list_logical_devices("CPU")]
        return tf.distribute.MirroredStrategy(
            devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
    learners = _LEARNERS.value
    return tf_syncdist.ModelAveragingStrategy(
        learners_per_device=learners if learners == "auto" else int(learners)
    )


def _train(data: Dataset, seed: int) -> dict:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    strategy = _strategy()
    with strategy.scope():
        model = _model()
    times = int(_LEARNERS.value) if _SYSTEM.value == "mirrored" else 1
    size = _BATCH.value * times
    begin = time.perf_counter()
    if _LEARNERS.value == "auto":
        # So that the number of learners is known; what this costs is told apart.
        model.fit(data.x_train[:size], data.y_train[:size], batch_size=size, epochs=0, verbose=0)
    tuning_seconds = time.perf_counter() - begin
    learners = getattr(strategy, "num_learners", times)
    each = size * learners if _SYSTEM.value == "sma" else size
    clock = _Clock(data, -(-len(data.x_train) // each))
    clock.start(model)
    model.fit(
        data.x_train,
        data.y_train,
        batch_size=size,
        epochs=_EPOCHS.value,
        verbose=0,
        callbacks=[clock],
    )
    reached = [c for c in clock.curve if c[2] >= _TARGET.value]
    seconds, epochs, _ = reached[0] if reached else (float("nan"), float("nan"), 0.0)
    return {
        "seed": seed,
        "learners": learners,
        "seconds_to_target": seconds,
        "epochs_to_target": epochs,
        "tuning_seconds": tuning_seconds,
        "runs_per_second": clock._runs / clock.curve[-1][0],
        "final_accuracy": clock.curve[-1][2],
        "curve": clock.curve,
    }


def main(argv: list[str]) -> None:
    """Trains once for each seed."""
    if _SYSTEM.value == "mirrored" and int(_LEARNERS.value) > 1:
        (cpu,) = tf.config.list_physical_devices("CPU")
        one = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [one] * int(_LEARNERS.value))
    data = load_mnist(_DATA_DIR.value)
    for seed in _SEEDS.value:
        print(json.dumps(_train(data, int(seed))), flush=True)


if __name__ == "__main__":
    app.run(main)
