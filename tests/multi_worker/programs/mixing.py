"""Trains with a strategy in which every worker has its own clock, in all the ways that there are.

First workers take turns, so that what comes of it can be calculated. What happens then, and whether
it does, is what the arguments say.
"""

import contextlib
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

ARGUMENTS = task.ARGUMENTS
DIRECTORY = Path(ARGUMENTS["directory"])
STRATEGIES = {
    "elastic": tf_syncdist.ElasticAveragingStrategy,
    "gossip": tf_syncdist.GossipStrategy,
    "async": tf_syncdist.AsyncStrategy,
}
SCHEDULE: list[int] = ARGUMENTS["schedule"]
FEATURES, BATCH_SIZE = 3, 4
LEARNING_RATE, MOMENTUM = 0.05, 0.9
MEGABYTES = ARGUMENTS.get("megabytes", 48)

options = dict(ARGUMENTS["options"])
me = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
if "partners" in options:
    options["partners"] = options["partners"][me]
strategy = STRATEGIES[ARGUMENTS["kind"]](
    connect_timeout_seconds=100.0, timeout_seconds=150.0, detection_seconds=60.0, **options
)
num_workers = strategy.num_workers


def wait_for(path: Path, seconds: float = 100.0) -> None:
    """Waits until a file is there; no part of what is tested."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} was not there within {seconds:g} s")
        time.sleep(0.005)


def weights_of(model: keras.Model) -> list[float]:
    """Returns all weights of a small model."""
    return np.concatenate([w.reshape(-1) for w in model.get_weights()]).astype(float).tolist()


# Taking turns.


class Turns(keras.callbacks.Callback):
    """Lets workers do their runs one after the other, as the schedule says.

    Args:
        name: Of the training.
        looks: Whether it looks at the model after each run.
    """

    def __init__(self, name: str, looks: bool) -> None:
        super().__init__()
        self.seen: list[list[float]] = []
        self.drawn: list[bool] = []
        self._name = name
        self._looks = looks
        self._mine = [turn for turn, worker in enumerate(SCHEDULE) if worker == me]

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Waits for this worker's turn."""
        if self._mine[batch]:
            wait_for(DIRECTORY / f"{self._name}.turn-{self._mine[batch] - 1}")
        if self._looks:
            # Others have trained since this worker's last run; it goes on as if it had not looked.
            self.model.get_weights()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Lets the next one go on."""
        if self._looks:
            self.seen.append(weights_of(self.model))
        self.drawn.append(strategy._exchanger.exchanges().with_itself)
        (DIRECTORY / f"{self._name}.turn-{self._mine[batch]}").touch()


def own_data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what this worker learns from, a batch for each of its turns."""
    random = np.random.RandomState(seed + me)
    x = random.randn(SCHEDULE.count(me), BATCH_SIZE, FEATURES).astype("float32")
    return x, x.sum(-1, keepdims=True) + random.randn(*x.shape[:-1], 1).astype("float32")


def linear() -> keras.Model:
    """Returns a model of four weights, which are the same on all workers at first."""
    with strategy.scope():
        ones = keras.initializers.Constant(0.5)
        return keras.Sequential(
            [keras.Input((FEATURES,)), keras.layers.Dense(1, kernel_initializer=ones)]
        )


def turns_in_fit() -> dict[str, Any]:
    x, y = own_data(10)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    data = tf.data.Dataset.from_tensor_slices((x, y)).with_options(options)
    model = linear()
    start = weights_of(model)
    with strategy.scope():
        model.compile(keras.optimizers.SGD(LEARNING_RATE, MOMENTUM), "mse")
    turns = Turns("fit", looks=True)
    model.fit(data, verbose=0, callbacks=[turns])
    task.meet(strategy, "turns_in_fit")
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "start": start,
        "seen": turns.seen,
        "drawn": turns.drawn,
        "end": weights_of(model),
    }


def turns_in_loop() -> dict[str, Any]:
    """The own model is seen too: by a run itself, before its step."""
    x, y = own_data(20)
    model = linear()
    start = weights_of(model)
    with strategy.scope():
        optimizer = keras.optimizers.SGD(LEARNING_RATE, MOMENTUM)
        optimizer.build(model.trainable_variables)

    def replica_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        before = tf.concat([tf.reshape(v, [-1]) for v in model.trainable_variables], 0)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        with tf.control_dependencies([before]):
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return before

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return strategy.run(replica_step, (x, y))

    turns = Turns("loop", looks=False)
    own = []
    for number in range(len(x)):
        turns.on_train_batch_begin(number)
        own.append(step(tf.constant(x[number]), tf.constant(y[number])).numpy().tolist())
        turns.on_train_batch_end(number)
    task.meet(strategy, "turns_in_loop")
    distances = [strategy.distances()]
    # Who looks shows its own model, so the first look may have seen an older one of others.
    weights_of(model)
    task.meet(strategy, "turns_in_loop_seen")
    strategy.synchronize()
    distances.append(strategy.distances())
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "start": start,
        "own": own,
        "distances": distances,
        "drawn": turns.drawn,
        "end": weights_of(model),
    }


# Keras.


def examples(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.RandomState(seed).randn(count, 16).astype("float32")
    return x, x[:, :4].argmax(1)


TRAIN, TEST = examples(1, 480), examples(2, 200)


class Stop(keras.callbacks.Callback):
    """Ends a fit after an epoch."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self.model.stop_training = True


def classifier() -> keras.Model:
    keras.utils.set_random_seed(me)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((16,)),
                keras.layers.Dense(32, activation="relu"),
                keras.layers.BatchNormalization(momentum=0.8),
                keras.layers.Dropout(0.1),
                keras.layers.Dense(4),
            ]
        )
        model.compile(
            keras.optimizers.Adam(1e-2),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=3,
        )
    return model


def keras_model() -> dict[str, Any]:
    model = classifier()
    test = {"x": TEST[0], "y": TEST[1], "verbose": 0}
    # Who stands still for much longer than a run holds back all that draw it as their partner.
    model.evaluate(**test)
    slowly = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: time.sleep(0.05))
    task.meet(strategy, "keras_built")
    history = model.fit(
        *TRAIN, batch_size=16, epochs=6, verbose=0, validation_data=TEST, callbacks=[slowly]
    ).history
    task.meet(strategy, "keras_fit")
    found: dict[str, Any] = {
        "history": history,
        "evaluated": model.evaluate(**test, return_dict=True),
        "predicted": model.predict(TEST[0], verbose=0).sum().item(),
        "statistics": model.layers[1].moving_mean.numpy().tolist(),
        "weights_sha256": tf_syncdist.variables_sha256(model.weights),
        "iterations": int(model.optimizer.iterations.numpy()),
    }
    found["again"] = model.evaluate(**test, return_dict=True)
    if strategy.is_chief:
        model.save(DIRECTORY / "saved.keras")
        tf.train.Checkpoint(model=model).write(str(DIRECTORY / "checkpoint"))
        with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
            saved = keras.models.load_model(DIRECTORY / "saved.keras", compile=False)
            found["saved"] = saved.predict(TEST[0], verbose=0).sum().item()
            restored = keras.models.clone_model(saved)
            tf.train.Checkpoint(model=restored).read(str(DIRECTORY / "checkpoint"))
            found["restored"] = restored.predict(TEST[0], verbose=0).sum().item()
    task.meet(strategy, "keras_saved")
    callbacks = [slowly, Stop()] if me == 1 else [slowly]
    with looked_at(model, found.setdefault("looks", [])):
        again = model.fit(*TRAIN, batch_size=16, epochs=3, verbose=0, callbacks=callbacks)
    found["epochs"] = len(again.epoch)
    task.meet(strategy, "keras_again")
    found["evaluated_again"] = model.evaluate(**test, return_dict=True)
    found["written"] = written_in_between(model)
    return found


def written_in_between(model: keras.Model) -> dict[str, Any]:
    """Writes weights while others still have what was trained before."""
    task.meet(strategy, "keras_write")
    if me:
        wait_for(DIRECTORY / "written.0")
    written = [np.full(w.shape, 0.25, w.dtype) for w in model.get_weights()]
    model.set_weights(written)
    model.optimizer.learning_rate = 0.0
    model.fit(*TRAIN, batch_size=16, epochs=1, verbose=0)
    (DIRECTORY / f"written.{me}").touch()
    task.meet(strategy, "keras_written")
    strategy.synchronize()
    trained = [v.numpy() for v in model.trainable_variables]
    return {
        "unchanged": bool(all(np.array_equal(v, np.full_like(v, 0.25)) for v in trained)),
        "statistics": model.layers[1].moving_mean.numpy().tolist(),
    }


@contextlib.contextmanager
def looked_at(model: keras.Model, seen: list[bool]) -> Iterator[None]:
    """Looks at a model from another thread all the time, as a monitor does."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.01):
            seen.append(all(np.isfinite(w).all() for w in model.get_weights()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60.0)


# Custom loops.


class Loop:
    """A model, its optimizer and its step."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        keras.utils.set_random_seed(me)
        with strategy.scope():
            self.model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
            self.optimizer = optimizer
            self.optimizer.build(self.model.trainable_variables)

    def replica_step(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, self.model(x), True)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        return loss

    def test_step(self) -> tf.Tensor:
        losses = keras.losses.sparse_categorical_crossentropy(TEST[1], self.model(TEST[0]), True)
        return tf.reduce_mean(losses)

    def loss(self) -> float:
        """Returns that of what is outside of training."""
        return float(self.test_step())


def whole() -> Any:
    data = tf.data.Dataset.from_tensor_slices(TRAIN).batch(16).repeat(2)
    return strategy.experimental_distribute_dataset(data)


def own() -> Any:
    def make(context: tf.distribute.InputContext) -> tf.data.Dataset:
        data = tf.data.Dataset.from_tensor_slices(TRAIN)
        mine = data.shard(context.num_input_pipelines, context.input_pipeline_id)
        return mine.batch(context.get_per_replica_batch_size(16)).repeat(2)

    return strategy.distribute_datasets_from_function(make)


def run_in_function(loop: Loop) -> Callable:
    return tf.function(lambda x, y: strategy.run(loop.replica_step, (x, y)))


def eager(loop: Loop) -> Callable:
    return lambda x, y: strategy.run(loop.replica_step, (x, y))


def loops() -> Iterator[tuple[str, keras.optimizers.Optimizer, Callable, Callable]]:
    # Optimizers are made under the scope.
    with strategy.scope():
        yield "run_in_function", keras.optimizers.RMSprop(1e-2), run_in_function, own
        yield "eager", keras.optimizers.AdamW(2e-2), eager, whole


def custom_loops() -> dict[str, Any]:
    found = {}
    for name, optimizer, make_step, make_data in loops():
        loop = Loop(optimizer)
        step = make_step(loop)
        before = loop.loss()
        losses = [float(step(x, y)) for x, y in make_data()]
        # What was trained is there as long as its variables are.
        del step
        gc.collect()
        task.meet(strategy, name)
        tested = float(strategy.run(loop.test_step))
        loop.model.get_weights()
        task.meet(strategy, f"{name}_seen")
        strategy.synchronize()
        found[name] = {
            "steps": len(losses),
            "before": before,
            "tested": tested,
            "after": loop.loss(),
            "weights_sha256": tf_syncdist.variables_sha256(loop.model.weights),
        }
    return found


# A slow worker.


class StandsStill(task.Pause):
    """Takes its time, and after the first call until the others are done, however long that is."""

    def _wait(self) -> None:
        time.sleep(self.seconds)
        deadline = time.monotonic() + 100
        begun = len(list(DIRECTORY.glob("pace.[0-9]*"))) == num_workers
        while begun and len(list(DIRECTORY.glob("pace.done.*"))) < num_workers - 1:
            if time.monotonic() > deadline:
                raise TimeoutError("the others were not done within 100 s; they wait for this one")
            time.sleep(0.02)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return task.after(inputs, self._wait) if training else inputs


class Pace(keras.callbacks.Callback):
    """Counts this worker's runs until all others are done."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.runs = 0
        self._slow = slow

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Begins when all have done their first run; the slow one stops when the others end."""
        if not self.runs:
            task.meet(strategy, "pace")
        self.runs += 1
        if self._slow and len(list(DIRECTORY.glob("pace.done.*"))) == num_workers - 1:
            self.model.stop_training = True


def straggler() -> dict[str, Any]:
    slow = me == ARGUMENTS["slow"]
    x, y = examples(3, 8 * 30 * num_workers)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((16,)),
                StandsStill(0.2) if slow else task.Pause(0.02),
                keras.layers.Dense(4),
            ]
        )
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pace = Pace(slow)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[pace])
    if not slow:
        (DIRECTORY / f"pace.done.{me}").touch()
    return {"runs": pace.runs}


# What the service keeps.


def services() -> list[Path]:
    """Returns the directories of `ps` tasks' processes in /proc."""
    addresses = json.loads(os.environ["TF_CONFIG"])["cluster"]["ps"]
    ports = {f"--port={address.rpartition(':')[2]}".encode() for address in addresses}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if ports & set((entry / "cmdline").read_bytes().split(b"\0")):
                found.append(entry)
    assert len(found) == len(ports)
    return found


def private_bytes(processes: list[Path]) -> int:
    """Returns how much memory processes have that is not shared with others."""
    lines = [line.split() for p in processes for line in (p / "status").open()]
    return sum(int(line[1]) * 1024 for line in lines if line[0] == "RssAnon:")


def memory() -> dict[str, Any]:
    processes = services()
    with strategy.scope():
        value = keras.Variable(tf.zeros([MEGABYTES * 2**18]), trainable=True, name="value")
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build([value])

    @tf.function
    def step() -> None:
        def replica_step() -> None:
            optimizer.apply_gradients([(tf.ones_like(value), value)])

        strategy.run(replica_step)

    task.meet(strategy, "memory")
    before = private_bytes(processes)
    for _ in range(4):
        step()
    task.meet(strategy, "memory_used")
    after = private_bytes(processes)
    task.meet(strategy, "memory_seen")
    return {
        "model_bytes": MEGABYTES * 2**20,
        "kept_bytes": after - before,
        "centre_bytes": strategy.report().centre_bytes,
    }


def main() -> None:
    results: dict[str, Any] = {"fit": turns_in_fit(), "loop": turns_in_loop()}
    results["report"] = strategy.report()._asdict() | {"own": strategy.report().own._asdict()}
    results["report"]["workers"] = [w._asdict() for w in strategy.report().workers]
    parts = {"keras": keras_model, "loops": custom_loops, "straggler": straggler, "memory": memory}
    for name in ARGUMENTS["parts"]:
        results[name] = parts[name]()
    results["report_text"] = str(strategy.report())
    task.meet(strategy, "end")
    task.write(me, results)


main()
