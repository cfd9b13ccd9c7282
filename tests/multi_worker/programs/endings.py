"""Trains with input of unknown, uneven or no length, sharded in several ways, or slow to read."""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 12
FEATURES = 4

arguments = task.ARGUMENTS
strategy = tf_syncdist.SyncReplicasStrategy(
    backup_workers=arguments["backup_workers"],
    **task.patience(arguments["backup_workers"]),
)
worker = strategy.worker_index
pause = arguments["pause_seconds"] if worker == arguments["slow"] else 0.0
random = np.random.RandomState(0)
features = random.randn(600, FEATURES).astype("float32")
read: list[int] = []
LENGTHS = (5, 7, 6)


def example(index: int) -> tuple[np.ndarray, np.ndarray]:
    return features[index], features[index, :1]


def make(seconds: float = 0.0, steps_per_execution: int = 1) -> keras.Model:
    keras.utils.set_random_seed(0)
    with strategy.scope():
        inputs = keras.Input((FEATURES,))
        model = keras.Model(inputs, keras.layers.Dense(1)(task.Pause(seconds)(inputs)))
        model.compile(
            keras.optimizers.Adam(0.01),
            "mse",
            metrics=["mae"],
            steps_per_execution=steps_per_execution,
        )
    return model


def numbered(count: int) -> tf.data.Dataset:
    """Returns examples that note, where they are read, that they are."""

    def look(index: np.int64) -> np.ndarray:
        read.append(int(index))
        return features[index]

    def load(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.ensure_shape(tf.numpy_function(look, [index], tf.float32), (FEATURES,))
        return x, x[:1]

    return tf.data.Dataset.range(count).map(load)


def unknown(count: int) -> tf.data.Dataset:
    dataset = numbered(count).filter(lambda x, y: True).batch(BATCH_SIZE)
    assert int(dataset.cardinality()) == tf.data.UNKNOWN_CARDINALITY
    return dataset


class Steps(keras.callbacks.Callback):
    """Counts the batches of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.seen.append(0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.seen[-1] += 1


def fit(model: keras.Model, dataset: tf.data.Dataset, **kwargs: Any) -> dict[str, Any]:
    steps = Steps()
    read.clear()
    before = strategy.local_report()
    begin = time.monotonic()
    history = model.fit(dataset, epochs=3, verbose=0, shuffle=False, callbacks=[steps], **kwargs)
    return ended(model, before) | {
        "seen": steps.seen,
        "history": history.history,
        "seconds": time.monotonic() - begin,
        "read": len(read),
        "first_read": read[:3],
        "distinct": sorted(set(read)),
    }


def ended(model: keras.Model, before: Any) -> dict[str, Any]:
    after = strategy.local_report()
    return {
        "rounds": after.rounds - before.rounds,
        "contributed": after.contributed - before.contributed,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
    }


def own_shares() -> dict[str, Any]:
    """Each worker has a share of another length, in a custom loop."""
    model = make(pause)

    def share(context: tf.distribute.InputContext) -> tf.data.Dataset:
        size = context.get_per_replica_batch_size(BATCH_SIZE)
        count = LENGTHS[context.input_pipeline_id] * size
        return numbered(count).batch(size)

    dataset = strategy.distribute_datasets_from_function(share)

    def replica_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            error = tf.reduce_sum((model(x, training=True) - y) ** 2) / BATCH_SIZE
        gradients = tape.gradient(error, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return error

    @tf.function
    def step(batch: tuple) -> tf.Tensor:
        return strategy.run(replica_step, args=batch)

    @tf.function
    def epoch() -> tf.Tensor:
        steps = tf.constant(0)
        for batch in dataset:
            strategy.run(replica_step, args=batch)
            steps += 1
        return steps

    before = strategy.local_report()
    seen = []
    for _ in range(3):
        seen.append(0)
        for batch in dataset:
            step(batch)
            seen[-1] += 1
    result = ended(model, before) | {"seen": seen}
    result["looped"] = int(epoch())
    result["looped_rounds"] = strategy.local_report().rounds - before.rounds - result["rounds"]
    return result | {"weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables)}


def files() -> tf.data.Dataset:
    directory = pathlib.Path(arguments["directory"])
    paths = []
    for number in range(6):
        path = directory / f"part-{number}.txt"
        if worker == 0:
            lines = "".join(f"{number * 100 + i}\n" for i in range(20 + 4 * number))
            path.write_text(lines)
        paths.append(str(path))
    task.meet(strategy, "files")

    def load(line: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def look(number: np.int64) -> np.ndarray:
            read.append(int(number))
            return features[number]

        number = tf.strings.to_number(line, tf.int64)
        x = tf.ensure_shape(tf.numpy_function(look, [number], tf.float32), (FEATURES,))
        return x, x[:1]

    return tf.data.TextLineDataset(paths).map(load).batch(BATCH_SIZE, drop_remainder=False)


def with_policy(dataset: tf.data.Dataset, name: str) -> tf.data.Dataset:
    options = tf.data.Options()
    policy = getattr(tf.data.experimental.AutoShardPolicy, name)
    options.experimental_distribute.auto_shard_policy = policy
    return dataset.with_options(options)


def wait_for_reads(directory: pathlib.Path, count: int) -> None:
    """Waits until worker 0 has read so many batches, or all."""
    deadline = time.monotonic() + 100
    while not (directory / f"read-{min(count, 60)}").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"worker 0 has not read {count} batches within 100 s")
        time.sleep(0.02)


def slow_to_read() -> tf.data.Dataset:
    directory = pathlib.Path(arguments["directory"])

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in range(20):
            if worker == arguments["slow"]:
                time.sleep(arguments["read_seconds"])
                # The first batches of a pass come before all have begun it.
                if arguments["read_seconds"] and number > 2:
                    wait_for_reads(directory, 3 * len(read))
            read.append(number)
            if not worker:
                (directory / f"read-{len(read)}").touch()
            rows = features[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
            yield rows, rows[:, :1]

    spec = (
        tf.TensorSpec((None, FEATURES), tf.float32),
        tf.TensorSpec((None, 1), tf.float32),
    )
    dataset = tf.data.Dataset.from_generator(batches, output_signature=spec)
    return dataset.apply(tf.data.experimental.assert_cardinality(20))


def main() -> None:
    known = numbered(120).batch(BATCH_SIZE)
    unshared = numbered(60).filter(lambda x, y: True).batch(BATCH_SIZE)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "unknown": lambda: fit(make(pause), unknown(100)),
        "several_steps": lambda: fit(make(pause, 4), unknown(100)),
        "no_length": lambda: fit(
            make(pause), numbered(90).batch(BATCH_SIZE).repeat(), steps_per_epoch=7
        ),
        "own_shares": own_shares,
        "files": lambda: fit(make(pause), with_policy(files(), "FILE")),
        "dealt": lambda: fit(make(pause), with_policy(known, "DATA")),
        "off": lambda: fit(make(pause), with_policy(unshared, "OFF")),
        "off_known": lambda: fit(make(pause), with_policy(known, "OFF")),
        "slow_to_read": lambda: fit(make(), slow_to_read()),
    }
    task.write(
        worker,
        {n: case() for n, case in cases.items() if arguments.get("only") in (None, n)},
    )


main()
