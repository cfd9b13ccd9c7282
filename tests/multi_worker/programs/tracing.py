"""Counts how often the functions of a training are traced, in fit and in loops."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 16
STEPS = 5
RAGGED = 4

KIND = task.ARGUMENTS["strategy"]
if KIND == "mirrored":
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
else:
    strategy = tf_syncdist.SyncReplicasStrategy(
        backup_workers=task.ARGUMENTS.get("backup_workers", 0),
        **task.patience(task.ARGUMENTS.get("backup_workers", 0)),
    )
worker = 0 if KIND == "mirrored" else strategy.worker_index
pause = task.ARGUMENTS.get("pause_seconds", 0.0) if worker == 1 else 0.0

calls: Counter[str] = Counter()


class Counted(keras.layers.Layer):
    """Counts, in Python, how often it is called in training."""

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        calls["layer"] += bool(training)
        return task.slowly(inputs, pause) if training else inputs


def error(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    calls["loss"] += 1
    return tf.square(y_true - y_pred)


class Model(keras.Model):
    """Counts its training steps too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dense = Counted(), keras.layers.Dense(1)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.dense(self.layer(inputs, training=training))

    def train_step(self, *data: Any) -> Any:
        calls["train_step"] += 1
        return super().train_step(*data)


class Watch(keras.callbacks.Callback):
    """Notes the counts after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, int]] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.seen.append(dict(calls))


def examples(ragged: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.RandomState(1).randn(BATCH_SIZE * STEPS + ragged, 4).astype("float32")
    return x, x[:, :1]


def as_arrays(ragged: int) -> dict[str, Any]:
    x, y = examples(ragged)
    return {"x": x, "y": y, "batch_size": BATCH_SIZE}


def as_dataset(ragged: int) -> dict[str, Any]:
    return {"x": tf.data.Dataset.from_tensor_slices(examples(ragged)).batch(BATCH_SIZE)}


def fit(data: Callable[[int], dict[str, Any]], ragged: int = 0, **compiled: Any) -> dict[str, Any]:
    calls.clear()
    with strategy.scope():
        model = Model()
        model.compile("adam", error, metrics=["mae"], **compiled)
    watch = Watch()
    options = {"epochs": 2, "callbacks": [watch], "verbose": 0}
    model.fit(**data(ragged), **options)
    first = len(watch.seen)
    model.fit(**data(ragged), **options)
    iterations = int(model.optimizer.iterations.numpy())
    return {"seen": watch.seen, "first_fit": first, "iterations": iterations}


def loop(form: str, ragged: int = 0) -> dict[str, Any]:
    calls.clear()
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), Counted(), keras.layers.Dense(1)])
        optimizer = keras.optimizers.Adam()
        optimizer.build(model.trainable_variables)
    calls.clear()

    def replica_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        calls["train_step"] += 1
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(error(y, model(x, training=True))) / BATCH_SIZE
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return value

    if form == "in_function":

        @tf.function
        def step(x: Any, y: Any) -> Any:
            return strategy.run(replica_step, args=(x, y))

    else:
        function = tf.function(replica_step)

        def step(x: Any, y: Any) -> Any:
            return strategy.run(function, args=(x, y))

    @tf.function
    def epoch(data: Any) -> None:
        for x, y in data:
            strategy.run(replica_step, args=(x, y))

    dataset = tf.data.Dataset.from_tensor_slices(examples(ragged)).batch(BATCH_SIZE)
    data = strategy.experimental_distribute_dataset(dataset)
    seen = []
    for _ in range(4):
        if form == "epoch_in_function":
            epoch(data)
            seen.append(dict(calls))
            continue
        for x, y in data:
            step(x, y)
            seen.append(dict(calls))
    return {"seen": seen, "first_fit": len(seen) // 2}


def main() -> None:
    results = {
        "fit_arrays": fit(as_arrays),
        "fit_dataset": fit(as_dataset),
        "fit_several_steps": fit(as_dataset, steps_per_execution=2),
        "fit_several_steps_arrays": fit(as_arrays, steps_per_execution=2),
        "fit_ragged": fit(as_dataset, RAGGED),
        "in_function": loop("in_function"),
        "around_function": loop("around_function"),
        "epoch_in_function": loop("epoch_in_function"),
        "in_function_ragged": loop("in_function", RAGGED),
        "around_function_ragged": loop("around_function", RAGGED),
    }
    if KIND != "mirrored":
        task.meet(strategy, "end")
        results["local"] = strategy.local_report()._asdict()
    task.write(worker, results)


main()
