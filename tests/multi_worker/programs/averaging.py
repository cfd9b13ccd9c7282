"""Trains with model averaging on several workers, and by the pure rule besides."""

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf
from averaging_rule import Batch, Reference, dealt

import tf_syncdist

BATCH, BATCHES = 8, 11
DEVICES = task.ARGUMENTS.get("devices", 1)
RULE = task.ARGUMENTS.get("rule", {})
if DEVICES > 1:
    (cpu,) = tf.config.list_physical_devices("CPU")
    configuration = [tf.config.LogicalDeviceConfiguration()] * DEVICES
    tf.config.set_logical_device_configuration(cpu, configuration)
PATIENCE = {k: v for k, v in task.patience().items() if k != "bucket_bytes"}
strategy = tf_syncdist.ModelAveragingStrategy(task.ARGUMENTS["learners"], **RULE, **PATIENCE)


def each() -> int:
    """Returns how many learners a worker has."""
    return strategy.learners_per_worker


random = np.random.RandomState(0)
X = random.randn(BATCH * BATCHES, 6).astype("float32")
Y = (X[:, :1] * X[:, 1:2] + X.sum(1, keepdims=True)).astype("float32")
PARTS: list[Batch] = [(X[i : i + BATCH], Y[i : i + BATCH]) for i in range(0, len(X), BATCH)]


def dense(optimizer: Callable[[], keras.optimizers.Optimizer]) -> keras.Model:
    layers = [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    eagerly = task.ARGUMENTS.get("run_eagerly", False)
    model.compile(optimizer(), "mse", metrics=["mae"], run_eagerly=eagerly)
    return model


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.02, momentum=0.9)


def dropping() -> keras.optimizers.Optimizer:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.01, 0.002])
    return keras.optimizers.Adam(schedule)


def distance(first: Any, second: Any) -> float:
    """Returns by how much two models differ at most."""
    return max(float(np.max(np.abs(np.subtract(a, b)))) for a, b in zip(first, second, strict=True))


class Trace(keras.callbacks.Callback):
    """Notes the central model after every run."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []
        self.apart: list[list[float]] = []
        self.announced = None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.announced = self.params["steps"]
        self.values.append([np.array(v.numpy()) for v in self.model.trainable_variables])
        self.apart.append(strategy.distances())


@contextlib.contextmanager
def complaints(found: list[str]) -> Any:
    """Collects what Keras says of data that ran out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found += [str(w.message) for w in caught if "ran out" in str(w.message)]


def reference(optimizer: Callable, weights: list[np.ndarray]) -> Reference:
    rule = {k: v for k, v in RULE.items() if k != "central_momentum"}
    momentum = RULE.get("central_momentum", 0.9)
    learners = strategy.num_learners
    return Reference(lambda: dense(optimizer), weights, learners, momentum=momentum, **rule)


def trajectory(optimizer: Callable) -> dict[str, Any]:
    """Fits, and compares each run with the pure rule."""
    with strategy.scope():
        # Workers begin with worker 0's.
        keras.utils.set_random_seed(3 + strategy.worker_index)
        model = dense(optimizer)
    keras.utils.set_random_seed(3)
    weights, trace, said = dense(optimizer).get_weights(), Trace(), []
    with complaints(said):
        model.fit(
            *(X, Y),
            batch_size=BATCH,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[trace],
        )
    rule = reference(optimizer, weights)
    differences, apart = [], []
    for run, batches in enumerate(dealt(PARTS, strategy.num_workers, each(), len(trace.values))):
        rule.step(batches)
        differences.append(distance(rule.central(), trace.values[run]))
        mine = rule.models[strategy.worker_index * each() :][: each()]
        apart.append(distance([relative(m, rule.central()) for m in mine], trace.apart[run]))
    return {
        "learners": strategy.num_learners,
        "runs": len(trace.values),
        "announced": trace.announced,
        "difference": max(differences),
        "apart": max(apart),
        "moved": distance(weights, trace.values[-1]),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "complaints": said,
        "iterations": int(model.optimizer.iterations.numpy()),
    }


def relative(model: keras.Model, central: list[np.ndarray]) -> float:
    """Returns how far a learner is from the central model, in lengths of that."""
    own = [v.numpy() for v in model.trainable_variables]
    apart = sum(np.sum((a - b) ** 2) for a, b in zip(own, central, strict=True))
    return float(np.sqrt(apart / sum(np.sum(b**2) for b in central)))


def outside() -> dict[str, Any]:
    """Looks at the model in all ways that there are after training, and writes to it."""
    with strategy.scope():
        model = dense(sgd)
    trace = Trace()
    model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[trace])
    plain = dense(sgd)
    plain.set_weights(model.get_weights())
    directory = Path(tempfile.mkdtemp(dir="."))
    model.save(directory / "model.keras")
    loaded = keras.models.load_model(directory / "model.keras")
    evaluated = [m.evaluate(X, Y, verbose=0) for m in (model, plain)]
    predicted = [m.predict(X, verbose=0) for m in (model, plain)]
    found = {
        "get_weights": distance(model.get_weights(), trace.values[-1]),
        "save": distance(loaded.get_weights(), trace.values[-1]),
        "evaluate": distance(evaluated[:1], evaluated[1:]),
        "predict": distance(predicted[:1], predicted[1:]),
        "apart": strategy.distances(),
        "apart_before": trace.apart[-1],
    }
    # What one worker writes the others do not have; a fit begins with worker 0's.
    task.meet(strategy, "apart")
    if strategy.worker_index:
        model.set_weights([w + 1.0 for w in model.get_weights()])
    else:
        model.set_weights([w + 0.5 for w in model.get_weights()])
    found["after_set_weights"] = strategy.distances()
    wanted = [w + 0.5 for w in trace.values[-1]]
    model.optimizer.learning_rate = 0.0
    for slot in model.optimizer.variables[2:]:
        slot.assign(tf.zeros(slot.shape))
    model.fit(X, Y, batch_size=BATCH, verbose=0)
    found["from_worker_0"] = distance(model.get_weights(), wanted)
    return found


def statistics() -> dict[str, Any]:
    """Trains with batch normalisation; the statistics of learners are not alike."""
    with strategy.scope():
        norm = keras.layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((6,)), norm, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
    seen: list[np.ndarray] = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(norm.moving_mean.numpy())
    )
    given = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    history = model.fit(X, Y, callbacks=[note], **given)
    means, mine = np.zeros((strategy.num_learners, 6)), []
    for batches in dealt(PARTS, strategy.num_workers, each(), len(seen)):
        means = 0.5 * means + 0.5 * np.array([b[0].mean(0) for b in batches])
        mine.append(means[strategy.worker_index * each() :][: each()].mean(0))
    return {
        "own": distance(mine, seen),
        "at_the_end": distance([means.mean(0)], [norm.moving_mean.numpy()]),
        "logs": {k: v[-1] for k, v in history.history.items()},
        "sha256": tf_syncdist.variables_sha256([norm.moving_mean, norm.moving_variance]),
    }


class Silent(keras.Sequential):
    """Trains without metrics."""

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def without_metrics() -> dict[str, Any]:
    """Notes the statistics of batch normalisation as callbacks after an epoch see them."""
    found: dict[str, list[str]] = {"callback": [], "validation": []}
    with strategy.scope():
        norm = keras.layers.BatchNormalization(momentum=0.5)
        model = Silent([keras.Input((6,)), norm, keras.layers.Dense(1)])
        model.compile(sgd(), "mse")

    def note(where: str) -> None:
        found[where].append(tf_syncdist.variables_sha256([norm.moving_mean]))

    notes = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: note("callback"))
    given = {"batch_size": BATCH, "verbose": 0}
    model.fit(X, Y, epochs=2, callbacks=[notes], **given)
    looks = keras.callbacks.LambdaCallback()
    looks.on_test_begin = lambda logs=None: note("validation")
    model.fit(X, Y, epochs=2, callbacks=[looks], validation_data=(X, Y), **given)
    return found


def averages() -> dict[str, Any]:
    """Trains with optimizers that average models over time."""

    def averaging_sgd() -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(0.02, use_ema=True, ema_momentum=0.7)

    with strategy.scope():
        keras.utils.set_random_seed(3)
        model = dense(averaging_sgd)
    rule = reference(averaging_sgd, model.get_weights())
    given = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(X, Y, **given)
    for batches in dealt(PARTS, strategy.num_workers, each(), 6):
        rule.step(batches)
    for learner in rule.models:
        learner.optimizer.finalize_variable_values(learner.trainable_variables)
    learners = [m.get_weights() for m in rule.models]
    expected = [np.mean(values, axis=0) for values in zip(*learners, strict=True)]
    return {
        "difference": distance(model.get_weights(), expected),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
    }


class Notes(keras.layers.Layer):
    """Passes its input through and notes it in training."""

    seen: list[list[int]] = []

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not tf.is_symbolic_tensor(inputs):
            return inputs
        with tf.control_dependencies([tf.numpy_function(self.note, [inputs], tf.float32)]):
            return tf.identity(inputs)

    @classmethod
    def note(cls, inputs: np.ndarray) -> np.float32:
        cls.seen.append([int(i) for i in inputs[:, 0]])
        return np.float32(0)


def given() -> dict[str, Any]:
    """Notes which examples this worker's learners were given in fits of all kinds."""
    x = np.arange(50, dtype="float32")[:, None]
    y = np.zeros_like(x)
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), Notes(), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-6), "mse")
    examples = tf.data.Dataset.from_tensor_slices((x, y))
    results = {}

    def fit(name: str, *args: Any, **kwargs: Any) -> None:
        Notes.seen.clear()
        before, said = strategy.local_report().rounds, []
        with complaints(said):
            model.fit(*args, verbose=0, **kwargs)
        runs = strategy.local_report().rounds - before
        results[name] = {"seen": list(Notes.seen), "runs": runs, "complaints": said}

    fit("arrays", x, y, batch_size=8, epochs=2)
    fit("dataset", examples.shuffle(50).batch(8), epochs=2)
    fit("whole", examples.take(48).batch(8))
    fit("steps", examples.repeat().batch(8), epochs=2, steps_per_epoch=3)
    fit("unknown", examples.filter(lambda a, b: a[0] < 40).batch(8), epochs=2)
    Notes.seen.clear()
    model.train_on_batch(x[:16], y[:16])
    results["train_on_batch"] = {"seen": list(Notes.seen)}
    return results


def loops() -> dict[str, Any]:
    """Trains in custom loops, in a graph and as the user has written it."""
    results = {}
    for name in ("graph", "eager", "from_function"):
        with strategy.scope():
            keras.utils.set_random_seed(3)
            model, optimizer = dense(sgd), sgd()
            optimizer.build(model.trainable_variables)
        weights = model.get_weights()

        def train(batch: Any, model: Any = model, optimizer: Any = optimizer) -> tf.Tensor:
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss

        def step(batch: Any, train: Callable = train) -> Any:
            return strategy.reduce("MEAN", strategy.run(train, args=(batch,)), axis=None)

        dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
        if name == "from_function":
            shares = strategy.distribute_datasets_from_function(
                lambda c, d=dataset: d.repeat().shard(c.num_input_pipelines, c.input_pipeline_id)
            )
            shares = (batch for batch, _ in zip(shares, range(3), strict=False))
        else:
            shares = strategy.experimental_distribute_dataset(dataset)
        call = step if name == "eager" else tf.function(step)
        losses = [float(call(batch)) for batch in shares]
        rule = reference(sgd, weights)
        for batches in dealt(PARTS, strategy.num_workers, each(), len(losses)):
            rule.step(batches)
        values = [v.numpy() for v in model.trainable_variables]
        results[name] = {
            "difference": distance(rule.central(), values),
            "runs": len(losses),
            "losses": losses,
        }
    return results


def waiting() -> dict[str, Any]:
    """Trains with a worker that takes its time."""
    with strategy.scope():
        layers = [keras.Input((6,)), task.Pause(0.05 * strategy.worker_index)]
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile(sgd(), "mse")
    ends: list[float] = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.monotonic())
    )
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[note])
    return {
        "seconds": float(np.median(np.diff(ends))),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
    }


def reported() -> dict[str, Any]:
    """Returns what the report says when everybody has come to its end."""
    task.meet(strategy, "report")
    deadline = time.monotonic() + 60
    while True:
        report = strategy.report()
        done = [w.contributed + w.late + w.replayed for w in report.rounds.workers]
        if min(done) == report.own.mixed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return {
        "runs": report.runs,
        "averaged": report.own.mixed,
        "staleness": report.own.staleness_max,
        "mixed": [w.mixed for w in report.workers],
        "learners": list(report.learners),
        "apart": strategy.distances(),
        "text": str(report),
    }


def refused() -> dict[str, str]:
    """Returns what is said of what several workers cannot do."""
    found = {}
    with strategy.scope():
        model = dense(sgd)
        model.compile(sgd(), "mse", jit_compile=True)
        optimizer = sgd()
        optimizer.build(model.trainable_variables)

    def replica_step() -> None:
        gradients = [tf.ones_like(v) for v in model.trainable_variables]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step = tf.function(lambda: strategy.run(replica_step), jit_compile=True)
    for name, wrong in {
        "jit_compile": lambda: model.fit(X, Y, batch_size=BATCH, verbose=0),
        "jit_compile_in_loop": step,
    }.items():
        try:
            wrong()
        except ValueError as e:
            found[name] = str(e)
    return found


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "sgd": lambda: trajectory(sgd),
    "dropping": lambda: trajectory(dropping),
    "outside": outside,
    "statistics": statistics,
    "averages": averages,
    "without_metrics": without_metrics,
    "given": given,
    "loops": loops,
    "waiting": waiting,
    "refused": refused,
    "report": reported,
}
results: dict[str, Any] = {"learners": strategy.num_learners}
for name in task.ARGUMENTS["cases"]:
    results[name] = CASES[name]()
task.write(strategy.worker_index, results)
