"""One worker process of the straggler benchmark, started by benchmarks.stragglers.

It trains a small model in a custom loop whose step sleeps for a fixed time, so that the step
time does not depend on how many cores the workers share.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

_SYSTEM = flags.DEFINE_enum("system", "ours", ["ours", "mwms"], "Strategy under test.")
_BACKUP_WORKERS = flags.DEFINE_integer("backup_workers", 0, "Backup workers, for ours.")
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.05, "Sleep of a step.")
_SLOW_FACTOR = flags.DEFINE_float("slow_factor", 10.0, "How much longer a slow step sleeps.")
_SLOW_PROBABILITY = flags.DEFINE_float(
    "slow_probability", 0.0, "Probability that a step is slow: 0 for a fast worker, 1 for a slow."
)
_WARMUP_ROUNDS = flags.DEFINE_integer("warmup_rounds", 10, "Rounds before the measured ones.")
_ROUNDS = flags.DEFINE_integer("rounds", 60, "Measured rounds.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random delays.")
_GIVE_UP_AT = flags.DEFINE_float(
    "give_up_at", None, "time.time() when the process prints its stacks and exits.", required=True
)
_RESULT_FILE = flags.DEFINE_string("result_file", None, "Where the result goes.", required=True)

_BATCH_SIZE = 32
_FEATURES = 16
_CLASSES = 10
_COUNTS = ("contributed", "late", "replayed")


def _make_strategy() -> tf.distribute.Strategy:
    """Returns the strategy under test, with its place in the cluster taken from TF_CONFIG."""
    if _SYSTEM.value == "mwms":
        return tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                implementation=tf.distribute.experimental.CommunicationImplementation.RING
            )
        )
    # Not at the top: the peer has to run where tf_syncdist cannot be imported.
    import tf_syncdist

    return tf_syncdist.SyncReplicasStrategy(backup_workers=_BACKUP_WORKERS.value)


def _make_sleep(worker_index: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that passes its input on after the sleep of one step."""
    choices = random.Random(_SEED.value * 1000 + worker_index)

    def sleep(features: np.ndarray) -> np.ndarray:
        slow = choices.random() < _SLOW_PROBABILITY.value
        time.sleep(_STEP_SECONDS.value * (_SLOW_FACTOR.value if slow else 1.0))
        return features

    return sleep


def _make_train_step(
    strategy: tf.distribute.Strategy, model: keras.Model, worker_index: int
) -> Callable[[tuple[tf.Tensor, tf.Tensor]], None]:
    """Returns a compiled training step that sleeps before it computes the gradients."""
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(model.trainable_variables)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sleep = _make_sleep(worker_index)

    def step_fn(batch: tuple[tf.Tensor, tf.Tensor]) -> None:
        features, labels = batch
        # Inside the step, so that a replayed one does not sleep; the gradients depend on its
        # output, so that they cannot be computed or sent earlier.
        slept = tf.numpy_function(sleep, [features], features.dtype)
        slept.set_shape(features.shape)
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(slept, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    @tf.function
    def train_step(batch: tuple[tf.Tensor, tf.Tensor]) -> None:
        strategy.run(step_fn, args=(batch,))

    return train_step


def _make_batch(worker_index: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a batch that differs from those of the other workers."""
    generator = np.random.default_rng(worker_index)
    features = generator.standard_normal((_BATCH_SIZE, _FEATURES)).astype(np.float32)
    labels = generator.integers(_CLASSES, size=_BATCH_SIZE)
    return tf.constant(features), tf.constant(labels)


def _counts(strategy: tf.distribute.Strategy) -> dict[str, int]:
    """Returns what has become of the rounds of this worker so far; the peer does not count."""
    if _SYSTEM.value == "mwms":
        return {}
    report = strategy.local_report()
    return {name: int(getattr(report, name)) for name in _COUNTS}


def _train() -> dict[str, Any]:
    """Runs all rounds and returns the times and counts of the measured ones."""
    worker_index = int(json.loads(os.environ["TF_CONFIG"])["task"]["index"])
    strategy = _make_strategy()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((_FEATURES,)),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dense(_CLASSES),
            ]
        )
    train_step = _make_train_step(strategy, model, worker_index)
    batch = _make_batch(worker_index)

    for _ in range(_WARMUP_ROUNDS.value):
        train_step(batch)
    before, start = _counts(strategy), time.time()
    for _ in range(_ROUNDS.value):
        train_step(batch)
    end, after = time.time(), _counts(strategy)
    return {
        "seconds": end - start,
        "ended_at": end,
        "counts": {name: after[name] - before[name] for name in before},
        "weight_sum": float(sum(np.sum(np.abs(weight)) for weight in model.get_weights())),
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
