"""Trains with strategy.run inside of a tf.function, with one inside of it, and eagerly."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 32
STEPS = 30

strategy = tf_syncdist.SyncReplicasStrategy(backup_workers=1, **task.patience(1))
slow = strategy.worker_index == task.ARGUMENTS["slow"]
contexts: list[tf.distribute.InputContext] = []


def examples() -> tf.data.Dataset:
    x = np.random.RandomState(1).randn(BATCH_SIZE * STEPS, 16).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, x[:, :4].argmax(1)))


def whole() -> tf.data.Dataset:
    return strategy.experimental_distribute_dataset(examples().batch(BATCH_SIZE))


def own() -> tf.data.Dataset:
    def make(context: tf.distribute.InputContext) -> tf.data.Dataset:
        contexts.append(context)
        share = examples().shard(context.num_input_pipelines, context.input_pipeline_id)
        return share.repeat().batch(context.get_per_replica_batch_size(BATCH_SIZE)).take(STEPS)

    return strategy.distribute_datasets_from_function(make)


class Loop:
    """A model, its metrics and its step."""

    def __init__(self) -> None:
        keras.utils.set_random_seed(strategy.worker_index)
        with strategy.scope():
            self.model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
            self.optimizer = keras.optimizers.Adam(1e-2)
            self.optimizer.build(self.model.trainable_variables)
            self.accuracy = keras.metrics.SparseCategoricalAccuracy()
            self.loss = keras.metrics.Mean()
            self.pause = task.FallsBehind(0.2 if slow else 0.0, strategy)
        self.losses = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)

    def replica_step(self, x: tf.Tensor, y: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.GradientTape() as tape:
            logits = self.model(self.pause(x, training=True), training=True)
            losses = self.losses(y, logits)
            loss = tf.nn.compute_average_loss(losses, global_batch_size=BATCH_SIZE)
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        self.accuracy.update_state(y, logits)
        self.loss.update_state(losses)
        return {"loss": loss, "examples": tf.shape(x)[0]}


def run_in_function(loop: Loop) -> Callable:
    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> dict[str, tf.Tensor]:
        return strategy.reduce("SUM", strategy.run(loop.replica_step, args=(x, y)), axis=None)

    return step


def function_in_run(loop: Loop) -> Callable:
    function = tf.function(loop.replica_step)
    return lambda x, y: strategy.reduce("SUM", strategy.run(function, args=(x, y)), axis=None)


def eager(loop: Loop) -> Callable:
    return lambda x, y: strategy.reduce(
        "SUM", strategy.run(loop.replica_step, args=(x, y)), axis=None
    )


def variants() -> Iterator[tuple[str, Callable, Callable]]:
    yield "run_in_function", run_in_function, whole
    yield "function_in_run", function_in_run, own
    yield "eager", eager, whole


def train(make_step: Callable, data: Any) -> dict[str, Any]:
    loop = Loop()
    step = make_step(loop)
    before = strategy.local_report()
    started_at = time.monotonic()
    reduced = [step(x, y) for x, y in data]
    seconds = time.monotonic() - started_at
    results = {
        "steps": len(reduced),
        "seconds": seconds,
        "examples": [int(r["examples"]) for r in reduced],
        "losses_are_finite": bool(np.all(np.isfinite([float(r["loss"]) for r in reduced]))),
        "first_loss": float(reduced[0]["loss"]),
        "last_loss": float(reduced[-1]["loss"]),
        "metrics": [float(loop.accuracy.result()), float(loop.loss.result())],
        "weights_sha256": tf_syncdist.variables_sha256(loop.model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(loop.optimizer.variables),
        "iterations": int(loop.optimizer.iterations.numpy()),
    }
    after = strategy.local_report()
    for name in ("rounds", "contributed", "late", "replayed"):
        results[name] = getattr(after, name) - getattr(before, name)
    return results


results = {name: train(make_step, make_data()) for name, make_step, make_data in variants()}
results["contexts"] = [
    [c.num_input_pipelines, c.input_pipeline_id, c.num_replicas_in_sync] for c in contexts
]
task.write(strategy.worker_index, {**results, **task.counts(strategy)})
