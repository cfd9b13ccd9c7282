"""Trains several models one after the other, under the strategy or, if "plain", without any."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 36
STEPS = 10
EPOCHS = 2

random = np.random.RandomState(5)
x = random.randn(BATCH_SIZE * STEPS, 12).astype("float32")
y = (x[:, :4] + 0.3 * x[:, 4:8]).argmax(1)
targets = (x[:, :3] * x[:, 3:6]).astype("float32")
weights = random.uniform(0.5, 1.5, len(x)).astype("float32")


class Residual(keras.Model):
    """A subclassed model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Dense(16, activation="tanh")
        self.second = keras.layers.Dense(16, activation="tanh")
        self.last = keras.layers.Dense(3)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        hidden = self.first(inputs)
        return self.last(hidden + self.second(hidden))


def classifier() -> keras.Model:
    return keras.Sequential(
        [keras.layers.Dense(24, activation="tanh"), keras.layers.Dense(4, activation="softmax")]
    )


def two_inputs() -> keras.Model:
    left, right = keras.Input((6,), name="left"), keras.Input((6,), name="right")
    hidden = [keras.layers.Dense(12, activation="tanh")(i) for i in (left, right)]
    return keras.Model([left, right], keras.layers.Dense(3)(keras.layers.concatenate(hidden)))


def sgd() -> keras.optimizers.Optimizer:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.7)
    return keras.optimizers.SGD(schedule, momentum=0.9)


def adamw() -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.01, 15))


def batched(*tensors: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(tensors).batch(BATCH_SIZE).prefetch(2)


def arrays() -> dict[str, Any]:
    return {"x": x, "y": y, "batch_size": BATCH_SIZE, "validation_data": (x[:50], y[:50])}


def cases() -> Iterator[tuple[str, Callable, Callable, dict, dict]]:
    """Yields name, model, optimizer, arguments of compile and arguments of fit."""
    labels = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}
    yield "sgd_sequential_arrays", classifier, sgd, labels, arrays()
    yield (
        "adam_functional_dataset",
        two_inputs,
        lambda: keras.optimizers.Adam(0.01),
        {"loss": "mse", "metrics": ["mae"]},
        {
            "x": batched((x[:, :6], x[:, 6:]), targets),
            "validation_data": batched((x[:, :6], x[:, 6:]), targets),
        },
    )
    yield (
        "adamw_subclassed_weighted",
        Residual,
        adamw,
        {"loss": "mse", "weighted_metrics": ["mae"], "steps_per_execution": 5},
        {"x": batched(x, targets, weights)},
    )
    yield (
        "sgd_accumulation",
        classifier,
        lambda: keras.optimizers.SGD(0.2, momentum=0.9, gradient_accumulation_steps=4),
        labels,
        arrays(),
    )
    yield "sgd_eager", classifier, sgd, labels | {"run_eagerly": True}, arrays()


def main() -> None:
    plain = task.ARGUMENTS["plain"]
    strategy = None if plain else tf_syncdist.SyncReplicasStrategy(**task.patience())
    worker = 0 if plain else strategy.worker_index
    results = {}
    for number, (name, build, optimizer, compiled, fitted) in enumerate(cases()):
        if task.ARGUMENTS.get("only", name) != name:
            continue
        # Worker 0 starts as a single process does; the others have to take its weights over.
        keras.utils.set_random_seed(100 * worker + number)
        with contextlib.nullcontext() if plain else strategy.scope():
            model = build()
            model.compile(optimizer(), **compiled)
        history = model.fit(epochs=EPOCHS, shuffle=False, verbose=0, **fitted).history
        results[name] = {
            "history": history,
            "weights": [w.tolist() for w in model.get_weights()],
            "optimizer": [np.asarray(v).tolist() for v in model.optimizer.variables],
            "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
            "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
            "rounds": 0 if plain else strategy.local_report().rounds,
        }
    task.write(worker, results)


main()
