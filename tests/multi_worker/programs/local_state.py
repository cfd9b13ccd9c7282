"""Trains with layers that have a state of their own: statistics, random generators, counters."""

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 24
STEPS = 5
FEATURES = 6

random = np.random.RandomState(5)
# Batches differ in size and place, so that their statistics do.
x = (random.randn(BATCH_SIZE * STEPS, FEATURES) * random.rand(FEATURES) * 3).astype("float32")
x += np.repeat(np.arange(STEPS), BATCH_SIZE)[:, None].astype("float32")
y = random.randn(BATCH_SIZE * STEPS, 2).astype("float32")

DIRECTORY = pathlib.Path(task.ARGUMENTS["directory"])


class Largest(keras.layers.Layer):
    """Keeps a moving mean of how large its inputs are, as a layer of a user's own would."""

    def build(self, shape: tuple) -> None:
        self.largest = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="largest_input"
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if training:
            found = keras.ops.max(keras.ops.abs(inputs))
            self.largest.assign(0.9 * self.largest + 0.1 * found)
        return inputs


class Noise(keras.layers.Layer):
    """Multiplies by random numbers of a kind and remembers which, run by run, on this worker."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.seen: list[list[float]] = []
        if kind == "dropout":
            self.dropout = keras.layers.Dropout(0.5)
        if kind == "seeded_dropout":
            self.dropout = keras.layers.Dropout(0.5, seed=11)
        if kind == "keras_generator":
            self.generator = keras.random.SeedGenerator(4)
        if kind == "tf_generator":
            self.generator = tf.random.Generator.from_seed(4)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return inputs
        ones = tf.ones((FEATURES * 4,))
        if self.kind in ("dropout", "seeded_dropout"):
            noise = self.dropout(ones, training=True)
        elif self.kind == "tf_dropout":
            noise = tf.nn.dropout(ones, 0.5)
        elif self.kind == "tf_random":
            noise = tf.random.uniform(ones.shape)
        elif self.kind == "tf_random_seeded":
            noise = tf.random.uniform(ones.shape, seed=9)
        elif self.kind == "tf_generator":
            noise = self.generator.uniform(ones.shape)
        else:
            noise = keras.random.uniform(ones.shape, seed=self.generator)

        def remember(values: np.ndarray) -> np.int64:
            self.seen.append(values.tolist())
            return np.int64(0)

        with tf.control_dependencies([tf.numpy_function(remember, [noise], tf.int64)]):
            return inputs * (1.0 + 0.01 * tf.reduce_mean(noise))


NOISES = (
    "dropout",
    "seeded_dropout",
    "keras_generator",
    "tf_generator",
    "tf_dropout",
    "tf_random",
    "tf_random_seeded",
)


class Counted(keras.layers.Layer):
    """Counts the runs that a worker computes, and takes its time in every second of them.

    If it takes any, it is late in the third one, however busy the machine is.
    """

    def __init__(self, pause: float, strategy: Any) -> None:
        super().__init__()
        self.pause = pause
        self.job = strategy
        self.runs = 0

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return inputs

        def count() -> np.int64:
            self.runs += 1
            time.sleep(self.pause * (self.runs % 2))
            if self.pause and self.runs == 3:
                # At the end of an epoch the others wait for this one.
                left = STEPS - self.job.local_report().rounds % STEPS
                task.fall_behind(self.job, min(2, left))
            return np.int64(0)

        with tf.control_dependencies([tf.numpy_function(count, [], tf.int64)]):
            return tf.identity(inputs)


class Statistics(keras.callbacks.Callback):
    """Notes what is averaged, before and after, and how many runs this worker has computed.

    With backup workers an average is that of the first N workers. Here these are all but worker 1.
    """

    def __init__(self, name: str, strategy: Any, counted: Counted) -> None:
        super().__init__()
        self.name = name
        self.strategy = strategy
        self.counted = counted
        self.before: list[list] = []
        self.after: list[list] = []
        self.computed: list[int] = []
        self.computed_before = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch < STEPS - 1:
            return
        self.before.append(self._values())
        self.computed.append(self.counted.runs - self.computed_before)
        self.computed_before = self.counted.runs
        place = f"{self.name}_{len(self.before)}"
        task.meet(self.strategy, f"{place}_trained")
        if task.ARGUMENTS["backup_workers"] and self.strategy.worker_index == 1:
            others = self.strategy.num_workers - 1
            while len(list(DIRECTORY.glob(f"{place}_averaged.*"))) < others:
                time.sleep(0.02)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.after.append(self._values())
        place = f"{self.name}_{len(self.after)}"
        (DIRECTORY / f"{place}_averaged.{self.strategy.worker_index}").touch()

    def _values(self) -> list:
        return [v.numpy().tolist() for v in _statistics(self.model)]


def _statistics(model: keras.Model) -> list:
    return [v for v in model.non_trainable_variables if "seed" not in v.path]


def in_scope(strategy: Any) -> Any:
    return strategy.scope() if strategy else contextlib.nullcontext()


def averaged(name: str, strategy: Any, layer: Callable, eager: bool = False) -> dict[str, Any]:
    """Trains with a layer whose statistics are averaged; worker 2 is slow in some runs."""
    keras.utils.set_random_seed(3)
    pause = task.ARGUMENTS["pause_seconds"] if strategy.worker_index == 2 else 0.0
    counted = Counted(pause, strategy)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((FEATURES,)), layer(), counted, keras.layers.Dense(2)]
        )
        model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=eager)
    start = [v.numpy().tolist() for v in _statistics(model)]
    statistics = Statistics(name, strategy, counted)
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=3, verbose=0, callbacks=[statistics])
    return {
        "start": start,
        "before": statistics.before,
        "after": statistics.after,
        "computed": statistics.computed,
        "statistics": [v.name for v in _statistics(model)],
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
    }


def noisy(strategy: Any, kind: str, eager: bool) -> dict[str, Any]:
    """Trains, then takes over worker 0's file and trains again, with random numbers."""
    keras.utils.set_random_seed(21)
    with in_scope(strategy):
        noise = Noise(kind)
        model = keras.Sequential([keras.Input((FEATURES,)), noise, keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=eager)
    initial = model.trainable_variables[0].numpy().tolist()
    fit = {"batch_size": BATCH_SIZE, "verbose": 0}
    model.fit(x, y, **fit)
    path = DIRECTORY / f"{kind}_{eager}.weights.h5"
    if strategy is None or strategy.is_chief:
        model.save_weights(path)
    if strategy:
        task.meet(strategy, f"saved_{kind}_{eager}")
    first, noise.seen = noise.seen, []
    model.load_weights(path)
    model.fit(x, y, **fit)
    return {
        "initial": initial,
        "first": first,
        "second": noise.seen,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
    }


def global_statistics(strategy: Any, synchronized: bool = True) -> dict[str, Any]:
    """Trains with statistics of whole batches."""
    keras.utils.set_random_seed(8)
    with in_scope(strategy):
        model = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                keras.layers.Dense(4, activation="tanh"),
                keras.layers.BatchNormalization(synchronized=synchronized),
                keras.layers.Dense(2),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    history = model.fit(x, y, batch_size=BATCH_SIZE, epochs=2, verbose=0, shuffle=False).history
    return {
        "weights": [w.tolist() for w in model.get_weights()],
        "history": history,
        "variables_sha256": tf_syncdist.variables_sha256(model.variables),
    }


def main() -> None:
    arguments = task.ARGUMENTS
    backup = arguments["backup_workers"]
    strategy = None
    if not arguments["plain"]:
        strategy = tf_syncdist.SyncReplicasStrategy(backup_workers=backup, **task.patience(backup))
    worker = strategy.worker_index if strategy else 0
    results: dict[str, Any] = {"noise": {}}
    if strategy:
        cases = {
            "batch_norm": {"layer": keras.layers.BatchNormalization},
            "eager_batch_norm": {"layer": keras.layers.BatchNormalization, "eager": True},
            "own_layer": {"layer": Largest},
        }
        for name, case in cases.items():
            results[name] = averaged(name, strategy, **case)
    if not backup:
        results["synchronized"] = global_statistics(strategy)
        for kind in NOISES:
            results["noise"][kind] = noisy(strategy, kind, eager=False)
        results["noise"]["eager_dropout"] = noisy(strategy, "dropout", eager=True)
    else:
        try:
            global_statistics(strategy)
        except ValueError as e:
            results["synchronized_error"] = str(e)
        task.meet(strategy, "refused")
        # The model is refused; the strategy goes on.
        results["afterwards"] = global_statistics(strategy, synchronized=False)
    task.write(worker, results)


main()
