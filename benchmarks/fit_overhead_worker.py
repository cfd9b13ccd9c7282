"""One process of benchmarks.fit_overhead: trains blocks of steps whenever it is told to.

It reads the name of a model from each line of its input, and answers with a line of JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

_SYSTEM = flags.DEFINE_enum("system", "ours", ["plain", "mirrored", "ours"], "The strategy.")
_STEPS = flags.DEFINE_integer("steps", 200, "Timed steps of a block.")
_GIVE_UP_AT = flags.DEFINE_float("give_up_at", None, "time.time() of the end.", required=True)

_BATCH_SIZE = 64
_BATCHES = 20
_CLASSES = 10


class _SecondEpochTimer(keras.callbacks.Callback):
    """Takes the time of the second epoch; the first one may trace, fill caches and so on.

    A callback at the end of each step would make Keras wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts."""
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Stops; the metrics in `logs` have been read, so all steps are done."""
        self.seconds = time.perf_counter() - self._begin


def _scope() -> contextlib.AbstractContextManager[object]:
    """Returns the scope in which models are built and compiled."""
    if _SYSTEM.value == "plain":
        return contextlib.nullcontext()
    if _SYSTEM.value == "mirrored":
        return tf.distribute.MirroredStrategy(["CPU:0"]).scope()
    # Not at the top: the peers have to run where tf_syncdist cannot be imported.
    import tf_syncdist

    return tf_syncdist.SyncReplicasStrategy(print_report=False).scope()


def _layers(model: str) -> list[keras.layers.Layer]:
    """Returns the layers of a model for images of 28 x 28."""
    layers = keras.layers
    if model == "mlp":
        return [layers.Flatten(), layers.Dense(128, "relu"), layers.Dense(_CLASSES)]
    return [
        layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(_CLASSES),
    ]


def _build(model: str) -> keras.Model:
    """Returns a compiled model."""
    keras.utils.set_random_seed(1)
    built = keras.Sequential([keras.Input((28, 28, 1)), *_layers(model)])
    built.compile(
        keras.optimizers.Adam(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return built


def _dataset() -> tf.data.Dataset:
    """Returns endless batches of random images."""
    generator = np.random.default_rng(0)
    count = _BATCH_SIZE * _BATCHES
    x = generator.random((count, 28, 28, 1), np.float32)
    y = generator.integers(_CLASSES, size=count)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(_BATCH_SIZE, drop_remainder=True)
    return batches.cache().repeat().prefetch(tf.data.AUTOTUNE)


def main(argv: list[str]) -> None:
    """Trains until the input ends."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    faulthandler.dump_traceback_later(max(0.1, _GIVE_UP_AT.value - time.time()), exit=True)
    os.environ.pop("TF_CONFIG", None)
    with _scope():
        models = {name: _build(name) for name in ("mlp", "cnn")}
    dataset = _dataset()
    for line in sys.stdin:
        timer = _SecondEpochTimer()
        history = models[line.strip()].fit(
            dataset,
            epochs=2,
            steps_per_epoch=_STEPS.value,
            verbose=0,
            shuffle=False,
            callbacks=[timer],
        )
        answer = {
            "steps_per_second": _STEPS.value / timer.seconds,
            "loss": float(history.history["loss"][-1]),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    app.run(main)
