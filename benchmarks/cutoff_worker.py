"""One worker process of benchmarks.cutoff_jobs.

It trains a small model in a custom loop. How long the step of each round sleeps is drawn from
regime_switching, alike on all workers, each of which takes the times of its own index.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_syncdist
from benchmarks import cutoff_script
from tf_syncdist.simulation import names

_CUTOFF = flags.DEFINE_string("cutoff", "full", "Name of the cutoff policy.")
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.1, "Sleep of a step of a normal worker.")
_FACTOR = flags.DEFINE_float("factor", 2.5, "How much longer a slow worker sleeps.")
_WARMUP_ROUNDS = flags.DEFINE_integer("warmup_rounds", 20, "Rounds before the measured ones.")
_ROUNDS = flags.DEFINE_integer("rounds", 200, "Measured rounds.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the delays.")
_GIVE_UP_AT = flags.DEFINE_float(
    "give_up_at", None, "time.time() when the process prints its stacks and exits.", required=True
)
_RESULT_FILE = flags.DEFINE_string("result_file", None, "Where the result goes.", required=True)

_BATCH_SIZE = 32
_FEATURES = 16
_COUNTS = ("contributed", "late", "replayed")


def _make_train_step(
    strategy: tf.distribute.Strategy, model: keras.Model, sleep: Callable[[np.ndarray], np.ndarray]
) -> Callable[[tf.Tensor], None]:
    """Returns a compiled training step that sleeps before it computes the gradients."""
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(model.trainable_variables)

    def step_fn(features: tf.Tensor) -> None:
        # Inside the step, so that a replayed one does not sleep; the gradients depend on its
        # output, so that they cannot be computed or sent earlier.
        slept = tf.numpy_function(sleep, [features], features.dtype)
        slept.set_shape(features.shape)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(slept, training=True)))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    @tf.function
    def train_step(features: tf.Tensor) -> None:
        strategy.run(step_fn, args=(features,))

    return train_step


def _train() -> dict[str, Any]:
    """Runs all rounds and returns the times and counts of the measured ones."""
    task = json.loads(os.environ["TF_CONFIG"])
    index, num_workers = task["task"]["index"], len(task["cluster"]["worker"])
    rounds = _WARMUP_ROUNDS.value + _ROUNDS.value
    script = cutoff_script.seconds(
        rounds, num_workers, _STEP_SECONDS.value, _FACTOR.value, _SEED.value
    )
    strategy = tf_syncdist.SyncReplicasStrategy(cutoff=names.cutoff(_CUTOFF.value, num_workers))
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input((_FEATURES,)), keras.layers.Dense(10)])
    number = 0

    def sleep(features: np.ndarray) -> np.ndarray:
        time.sleep(script[number, index])
        return features

    train_step = _make_train_step(strategy, model, sleep)
    generator = np.random.default_rng(index)
    features = tf.constant(generator.standard_normal((_BATCH_SIZE, _FEATURES)), tf.float32)

    def counts() -> dict[str, int]:
        report = strategy.local_report()
        return {name: int(getattr(report, name)) for name in _COUNTS}

    for number in range(rounds):
        if number == _WARMUP_ROUNDS.value:
            before, start = counts(), time.time()
        train_step(features)
    end, after = time.time(), counts()
    report = strategy.report().cutoff if index == 0 else None
    return {
        "seconds": end - start,
        "counts": {name: after[name] - before[name] for name in before},
        "report": report and report._asdict(),
    }


def main(argv: Sequence[str]) -> None:
    """Trains and writes the result."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    # The smallest delay keeps a deadline that has passed already from being an invalid one.
    faulthandler.dump_traceback_later(max(0.1, _GIVE_UP_AT.value - time.time()), exit=True)
    pathlib.Path(_RESULT_FILE.value).write_text(json.dumps(_train()))


if __name__ == "__main__":
    app.run(main)
