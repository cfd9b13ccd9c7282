"""Trains by every way into Keras' training, one model after the other."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 16
STEPS = 8
# The last batch has 10 examples, 5 for each of two workers.
EXAMPLES = BATCH_SIZE * (STEPS - 1) + 10

random = np.random.RandomState(11)
x = random.randn(EXAMPLES, 6).astype("float32")
labels = (x[:, :3] + 0.5 * x[:, 3:]).argmax(1)
targets = (x[:, :2] * x[:, 2:4]).astype("float32")
weights = random.uniform(0.5, 1.5, EXAMPLES).astype("float32")
words = np.array(["red", "green", "blue", "of no colour"])[labels]

plain: bool = task.ARGUMENTS["plain"]
strategy: Any = None
if not plain:
    strategy = tf_syncdist.SyncReplicasStrategy(
        backup_workers=task.ARGUMENTS.get("backup_workers", 0),
        **task.patience(task.ARGUMENTS.get("backup_workers", 0)),
    )
worker = 0 if plain else strategy.worker_index
pause = task.ARGUMENTS.get("pause_seconds", 0.0) if worker == 1 else 0.0
results: dict[str, Any] = {}


def scope() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if plain else strategy.scope()


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def stack(units: int, activation: str | None = None) -> list[keras.layers.Layer]:
    return [
        keras.layers.Dense(8, activation="tanh"),
        task.Pause(pause),
        keras.layers.Dense(units, activation=activation),
    ]


def classifier(**compiled: Any) -> keras.Model:
    with scope():
        model = keras.Sequential([keras.Input((6,)), *stack(3, "softmax")])
        model.compile(sgd(), "sparse_categorical_crossentropy", **compiled)
    return model


class OwnStep(keras.Model):
    """Has a train_step of its own, with metrics of its own or none."""

    def __init__(self, tracked: bool) -> None:
        super().__init__()
        self.body = keras.Sequential(stack(2))
        self.tracked = tracked
        self.mean = keras.metrics.Mean("mean_loss")
        self.errors = keras.metrics.MeanAbsoluteError("errors")

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.body(inputs, training=training)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return [self.mean, self.errors] if self.tracked else []

    def train_step(self, data: tuple) -> dict[str, tf.Tensor]:
        inputs, expected = data
        with tf.GradientTape() as tape:
            outputs = self(inputs, training=True)
            per_example = tf.reduce_mean((outputs - expected) ** 2, axis=-1)
            loss = tf.reduce_mean(per_example)
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            scaled = loss / replicas
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        if not self.tracked:
            return {"loss": loss, "largest": tf.reduce_max(per_example), "name": tf.constant("a")}
        self.mean.update_state(per_example)
        self.errors.update_state(expected, outputs)
        return {"mean_loss": self.mean.result(), "errors": self.errors.result()}


class Slices(keras.utils.PyDataset):
    """The examples in batches."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.passes = 0

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(index * BATCH_SIZE, (index + 1) * BATCH_SIZE)
        return x[part], labels[part]

    def on_epoch_end(self) -> None:
        self.passes += 1


def generator() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    slices = Slices()
    for index in range(STEPS):
        yield slices[index]


def endless() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        yield from generator()


def batched(*tensors: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(tensors).batch(BATCH_SIZE)


def fit(model: keras.Model, *data: Any, epochs: int = 2, **kwargs: Any) -> dict[str, list]:
    return model.fit(*data, epochs=epochs, shuffle=False, verbose=0, **kwargs).history


def arrays(model: keras.Model, **kwargs: Any) -> tuple[keras.Model, dict]:
    return model, fit(model, x, labels, batch_size=BATCH_SIZE, **kwargs)


def steps_per_execution() -> tuple[keras.Model, dict]:
    return arrays(classifier(steps_per_execution=3, metrics=["accuracy"]))


def run_eagerly() -> tuple[keras.Model, dict]:
    return arrays(classifier(run_eagerly=True, metrics=["accuracy"]))


def class_weight() -> tuple[keras.Model, dict]:
    return arrays(classifier(weighted_metrics=["accuracy"]), class_weight={0: 2.0, 1: 0.5, 2: 1.0})


def sample_weight() -> tuple[keras.Model, dict]:
    return arrays(classifier(weighted_metrics=["accuracy"]), sample_weight=weights)


def validation_split() -> tuple[keras.Model, dict]:
    # 102 examples remain: the last batch has 6.
    return arrays(classifier(metrics=["accuracy"]), validation_split=0.16)


def named() -> tuple[keras.Model, dict]:
    """Inputs by name, outputs by name, a loss for each."""
    with scope():
        given = {"left": keras.Input((3,), name="left"), "right": keras.Input((3,), name="right")}
        hidden = keras.layers.concatenate(list(given.values()))
        hidden = task.Pause(pause)(keras.layers.Dense(8, activation="tanh")(hidden))
        kind = keras.layers.Dense(3, activation="softmax", name="kind")(hidden)
        size = keras.layers.Dense(2, name="size")(hidden)
        model = keras.Model(given, {"kind": kind, "size": size})
        model.compile(
            sgd(),
            {"kind": "sparse_categorical_crossentropy", "size": "mse"},
            loss_weights={"kind": 1.0, "size": 0.3},
            metrics={"kind": "accuracy", "size": "mae"},
        )
    inputs = {"left": x[:, :3], "right": x[:, 3:]}
    return model, fit(model, inputs, {"kind": labels, "size": targets}, batch_size=BATCH_SIZE)


def own_step(tracked: bool) -> tuple[keras.Model, dict]:
    with scope():
        model = OwnStep(tracked)
        model.compile(sgd())
    return model, fit(model, batched(x, targets))


def own_step_metrics() -> tuple[keras.Model, dict]:
    return own_step(tracked=True)


def own_step_tensors() -> tuple[keras.Model, dict]:
    model, history = own_step(tracked=False)
    # They are those of a worker's own last run.
    return model, {"length": [len(v) for v in history.values()]}


def train_on_batch() -> tuple[keras.Model, dict]:
    model = classifier(metrics=["accuracy"])
    finite = []
    for _ in range(2):
        for inputs, expected in generator():
            finite.append(bool(np.all(np.isfinite(model.train_on_batch(inputs, expected)))))
    return model, {"finite": finite}


def train_on_batch_weighted() -> tuple[keras.Model, dict]:
    model = classifier()
    for index in range(STEPS):
        part = slice(index * BATCH_SIZE, (index + 1) * BATCH_SIZE)
        model.train_on_batch(x[part], labels[part], sample_weight=weights[part])
    for inputs, expected in generator():
        model.train_on_batch(inputs, expected, class_weight={0: 2.0, 1: 0.5, 2: 1.0})
    return model, {}


def batches_alone() -> tuple[keras.Model, dict]:
    """One worker alone tests and predicts batches, and all train on."""
    model, history = arrays(classifier(metrics=["accuracy"]))
    if plain or worker == 1:
        alone = model.test_on_batch(x, labels, return_dict=True)
        outputs = model(x).numpy()
        results["alone"] = {
            "tested": float(alone["accuracy"]),
            "accuracy": float(np.mean(outputs.argmax(1) == labels)),
            "difference": float(np.max(np.abs(model.predict_on_batch(x) - outputs))),
        }
    return model, arrays(model)[1]


def py_dataset() -> tuple[keras.Model, dict]:
    slices = Slices()
    model = classifier(metrics=["accuracy"])
    history = fit(model, slices)
    results["passes"] = slices.passes
    return model, history


def py_dataset_threads() -> tuple[keras.Model, dict]:
    model = classifier(metrics=["accuracy"])
    return model, fit(model, Slices(workers=2, max_queue_size=3))


def generator_once() -> tuple[keras.Model, dict]:
    """Its length is unknown; it cannot be read twice."""
    model = classifier(metrics=["accuracy"])
    return model, fit(model, generator(), epochs=1)


def generator_steps() -> tuple[keras.Model, dict]:
    model = classifier(metrics=["accuracy"])
    return model, fit(model, endless(), steps_per_epoch=STEPS)


def dataset_steps() -> tuple[keras.Model, dict]:
    """An epoch is a part of the data."""
    model = classifier(metrics=["accuracy"], steps_per_execution=2)
    data = batched(x[: 7 * BATCH_SIZE], labels[: 7 * BATCH_SIZE]).repeat()
    return model, fit(model, data, steps_per_epoch=5, epochs=3)


def dataset_distributed() -> tuple[keras.Model, dict]:
    """The user has distributed it, as for a custom loop."""
    model = classifier(metrics=["accuracy"])
    data = batched(x, labels)
    return model, fit(model, data if plain else strategy.experimental_distribute_dataset(data))


def several_fits() -> tuple[keras.Model, dict]:
    """Evaluates and predicts between fits, and goes on where it was."""
    model = classifier(metrics=["accuracy"])
    found = []
    for epochs in (1, 2):
        found.append(arrays(model, epochs=epochs)[1])
        found.append(model.evaluate(x, labels, verbose=0, return_dict=True))
        model.predict(x, verbose=0)
    last = arrays(model, epochs=4, initial_epoch=3, validation_data=(x, labels))[1]
    keys = [*found[0], *last]
    fits = [h for h in (found[0], found[2], last)]
    evaluated = {f"evaluated_{k}": [e[k] for e in (found[1], found[3])] for k in found[1]}
    return model, {**{k: sum((h.get(k, []) for h in fits), []) for k in keys}, **evaluated}


def sparse() -> tuple[keras.Model, dict]:
    with scope():
        inputs = keras.Input((6,), sparse=True)
        hidden = task.Pause(pause)(keras.layers.Dense(8, activation="tanh")(inputs))
        model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(hidden))
        model.compile(sgd(), "sparse_categorical_crossentropy")
    dense = np.where(x > 0, x, 0)
    return model, fit(model, batched(tf.sparse.from_dense(dense), labels))


class Lengths(keras.layers.Layer):
    """Turns ragged rows into their sums and lengths."""

    def call(self, inputs: Any) -> tf.Tensor:
        sums = tf.reduce_sum(inputs, axis=1)
        # Under any strategy Keras builds models with symbolic tensors, which are never ragged.
        is_ragged = isinstance(inputs, tf.RaggedTensor)
        lengths = tf.cast(inputs.row_lengths(), tf.float32) if is_ragged else sums
        return tf.stack([sums, lengths], axis=1)


class Ragged(keras.Model):
    """Takes ragged input."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths = Lengths()
        self.body = keras.Sequential(stack(3, "softmax"))

    def call(self, inputs: Any, training: bool = False) -> tf.Tensor:
        return self.body(self.lengths(inputs), training=training)


def ragged() -> tuple[keras.Model, dict]:
    rows = tf.RaggedTensor.from_row_lengths(x.ravel()[: (labels + 1).sum()], labels + 1)
    with scope():
        model = Ragged()
        model.compile(sgd(), "sparse_categorical_crossentropy")
    return model, fit(model, batched(rows, labels))


def strings() -> tuple[keras.Model, dict]:
    with scope():
        inputs = keras.Input((1,), dtype="string")
        found = keras.layers.StringLookup(vocabulary=["red", "green"], output_mode="one_hot")(
            inputs
        )
        hidden = task.Pause(pause)(keras.layers.Dense(8, activation="tanh")(found))
        model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(hidden))
        model.compile(sgd(), "sparse_categorical_crossentropy")
    return model, fit(model, batched(words[:, None], labels))


CASES: list[Callable[[], tuple[keras.Model, dict]]] = [
    steps_per_execution,
    run_eagerly,
    class_weight,
    sample_weight,
    validation_split,
    named,
    own_step_metrics,
    own_step_tensors,
    train_on_batch,
    train_on_batch_weighted,
    batches_alone,
    py_dataset,
    py_dataset_threads,
    generator_once,
    generator_steps,
    dataset_steps,
    dataset_distributed,
    several_fits,
    sparse,
    ragged,
    strings,
]


def main() -> None:
    for number, case in enumerate(CASES):
        if case.__name__ not in task.ARGUMENTS.get("only", case.__name__):
            continue
        keras.utils.set_random_seed(number)
        before = strategy.local_report() if strategy else None
        model, history = case()
        results[case.__name__] = {
            "history": history,
            "weights": [w.tolist() for w in model.get_weights()],
            "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
            "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
            "iterations": int(model.optimizer.iterations.numpy()),
        }
        if strategy:
            after = strategy.local_report()
            results[case.__name__]["rounds"] = after.rounds - before.rounds
            results[case.__name__]["left_out"] = (
                after.replayed + after.late - before.replayed - before.late
            )
    task.write(worker, results)


main()
