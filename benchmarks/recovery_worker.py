"""One worker process of the recovery benchmark, started by benchmarks.recovery.

It trains a small model in a custom loop whose step sleeps for a fixed time, until a file appears.
Next to the model stand frozen variables, which a worker that comes back has to be given too, while
gradients stay small. It notes the time of everything that the benchmark looks at.
"""

from __future__ import annotations

import faulthandler
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_syncdist

_BACKUP_WORKERS = flags.DEFINE_integer("backup_workers", 0, "Backup workers.")
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.05, "Sleep of a step.")
_STATE_MEGABYTES = flags.DEFINE_float("state_megabytes", 100.0, "Size of the state.")
_EVENTS_FILE = flags.DEFINE_string("events_file", None, "Where events go.", required=True)
_STOP_FILE = flags.DEFINE_string("stop_file", None, "Its existence ends training.", required=True)
_GIVE_UP_AT = flags.DEFINE_float(
    "give_up_at", None, "time.time() when the process prints its stacks and exits.", required=True
)
_RESULT_FILE = flags.DEFINE_string("result_file", None, "Where the result goes.", required=True)

_FEATURES, _CLASSES = 16, 10
_FROZEN = 10


class _Events:
    """A file with a line for each event."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def note(self, event: str, **more: Any) -> None:
        """Adds a line, and the time."""
        self._file.write(json.dumps({"event": event, "time": time.time(), **more}) + "\n")
        self._file.flush()


def _train(events: _Events) -> dict[str, Any]:
    """Trains until it is told to stop."""
    events.note("hello")
    strategy = tf_syncdist.SyncReplicasStrategy(_BACKUP_WORKERS.value)
    keras.utils.set_random_seed(strategy.worker_index)
    rows = max(1, int(_STATE_MEGABYTES.value * 1e6 / 4 / 1000 / _FROZEN))
    with strategy.scope():
        model = keras.Sequential([keras.Input((_FEATURES,)), keras.layers.Dense(_CLASSES)])
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(model.trainable_variables)
        frozen = [
            tf.Variable(tf.random.normal((rows, 1000)), trainable=False, name=f"frozen_{i}")
            for i in range(_FROZEN)
        ]
    has_computed = False

    def sleep(features: np.ndarray) -> np.ndarray:
        nonlocal has_computed
        if not has_computed:
            has_computed = True
            events.note("computes")
        time.sleep(_STEP_SECONDS.value)
        return features

    def step_fn(features: tf.Tensor) -> None:
        slept = tf.numpy_function(sleep, [features], features.dtype)
        slept.set_shape(features.shape)
        offset = tf.add_n([tf.reduce_sum(tf.gather(v, [0])) for v in frozen])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(slept, training=True) - offset) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    @tf.function
    def train_step(features: tf.Tensor) -> None:
        strategy.run(step_fn, args=(features,))

    generator = np.random.default_rng(strategy.worker_index)
    features = tf.constant(generator.standard_normal((32, _FEATURES)).astype(np.float32))
    while not pathlib.Path(_STOP_FILE.value).exists():
        train_step(features)
        report = strategy.local_report()
        rounds = int(optimizer.iterations.numpy())
        events.note("run", rounds=rounds, contributed=report.contributed)
    strategy.synchronize()
    variables = [*model.trainable_variables, *frozen]
    return {
        "variables_sha256": tf_syncdist.variables_sha256(variables),
        "rounds": int(optimizer.iterations.numpy()),
    }


def main(argv: Sequence[str]) -> None:
    """Trains and writes the result."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    faulthandler.dump_traceback_later(max(0.1, _GIVE_UP_AT.value - time.time()), exit=True)
    with open(_EVENTS_FILE.value, "w") as file:
        result = _train(_Events(file))
    pathlib.Path(_RESULT_FILE.value).write_text(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
