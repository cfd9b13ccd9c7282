"""Trains with model averaging, alone or on several workers, and by the pure rule besides."""

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf
from averaging_rule import Reference, dealt

import tf_syncdist

BATCH, BATCHES = 8, 11
PATIENCE = {k: v for k, v in task.PATIENCE.items() if k != "bucket_bytes"}

random = np.random.RandomState(0)
X = random.randn(BATCH * BATCHES, 6).astype("float32")
Y = (X[:, :1] * X[:, 1:2] + X.sum(1, keepdims=True)).astype("float32")
PARTS = [(X[i : i + BATCH], Y[i : i + BATCH]) for i in range(0, len(X), BATCH)]


def strategy_of(learners: int | str, **options: Any) -> tf_syncdist.ModelAveragingStrategy:
    return tf_syncdist.ModelAveragingStrategy(learners, **PATIENCE, **options)


def dense(optimizer: Callable[[], keras.optimizers.Optimizer]) -> keras.Model:
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    )
    model.compile(optimizer(), "mse", metrics=["mae"])
    return model


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.02, momentum=0.9)


def dropping() -> keras.optimizers.Optimizer:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([6], [0.02, 0.002])
    return keras.optimizers.SGD(schedule, momentum=0.9)


OPTIMIZERS = {
    "sgd": sgd,
    "adam": lambda: keras.optimizers.Adam(0.01),
    "accumulating": lambda: keras.optimizers.SGD(0.02, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0),
    "dropping": dropping,
}


class Trace(keras.callbacks.Callback):
    """Notes the central model after every run."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []
        self.steps = None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.steps = self.params["steps"]
        self.values.append([v.numpy().tolist() for v in self.model.trainable_variables])


def distance(first: Any, second: Any) -> float:
    """Returns by how much two models differ at most."""
    return max(float(np.max(np.abs(np.subtract(a, b)))) for a, b in zip(first, second, strict=True))


def trajectory(
    strategy: tf_syncdist.ModelAveragingStrategy,
    optimizer: str = "sgd",
    epochs: int = 2,
    **rule: Any,
) -> dict[str, Any]:
    """Fits, and compares each run with the pure rule."""
    with strategy.scope():
        model = dense(OPTIMIZERS[optimizer])
    weights, trace = model.get_weights(), Trace()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            *(X, Y), batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=[trace]
        )
    reference = Reference(
        lambda: dense(OPTIMIZERS[optimizer]), weights, strategy.num_learners, **rule
    )
    each = strategy.num_learners // strategy.num_workers
    differences = []
    for run, batches in enumerate(dealt(PARTS, strategy.num_workers, each, len(trace.values))):
        reference.step(batches)
        differences.append(distance(reference.values(), trace.values[run]))
    return {
        "runs": len(trace.values),
        "steps": trace.steps,
        "difference": max(differences),
        "moved": distance([w.tolist() for w in weights], trace.values[-1]),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "warnings": [str(w.message) for w in caught if "ran out" in str(w.message)],
        "iterations": int(model.optimizer.iterations.numpy()),
    }


def alike_plain(strategy: tf_syncdist.ModelAveragingStrategy) -> list[bool]:
    """Tells whether one learner is plain Keras, bit for bit, with dropout and all."""

    def build() -> keras.Model:
        keras.utils.set_random_seed(5)
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((6,)),
                *(layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.3)),
                layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model

    def fitted(model: keras.Model) -> list[np.ndarray]:
        model.fit(X, Y, batch_size=BATCH, epochs=3, verbose=0)
        return [v.numpy() for v in (*model.weights, *model.optimizer.variables)]

    plain = fitted(build())
    with strategy.scope():
        model = build()
    return [np.array_equal(a, b) for a, b in zip(plain, fitted(model), strict=True)]


def central_only(strategy: tf_syncdist.ModelAveragingStrategy) -> dict[str, Any]:
    """Looks at the model in all ways that there are after training, and writes to it."""
    with strategy.scope():
        model = dense(sgd)
    trace = Trace()
    model.fit(X, Y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[trace])
    plain = dense(sgd)
    plain.set_weights(model.get_weights())
    directory = tempfile.mkdtemp()
    model.save(os.path.join(directory, "model.keras"))
    loaded = keras.models.load_model(os.path.join(directory, "model.keras"))
    checkpoint = tf.train.Checkpoint(model=model)
    path = checkpoint.save(os.path.join(directory, "checkpoint"))
    other = dense(sgd)
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    apart = strategy.distances()
    results = {
        "get_weights": distance(model.get_weights(), trace.values[-1]),
        "evaluate": abs(model.evaluate(X, Y, verbose=0)[0] - plain.evaluate(X, Y, verbose=0)[0]),
        "predict": distance(
            [model.predict(X, verbose=0, batch_size=20)], [plain.predict(X, verbose=0)]
        ),
        "save": distance(loaded.get_weights(), trace.values[-1]),
        "checkpoint": distance(other.get_weights(), trace.values[-1]),
        "apart": [float(d) for d in apart],
        "apart_after_reading": [float(d) for d in strategy.distances()],
    }
    model.set_weights([w + 1.0 for w in model.get_weights()])
    results["after_set_weights"] = [float(d) for d in strategy.distances()]
    model.fit(X, Y, batch_size=BATCH, epochs=1, verbose=0)
    results["apart_again"] = [float(d) for d in strategy.distances()]
    checkpoint.restore(path)
    results["after_restore"] = [float(d) for d in strategy.distances()]
    results["restored"] = distance(model.get_weights(), trace.values[-1])
    # Learners begin with what was written, and the central model without momentum.
    trace = Trace()
    model.optimizer.learning_rate = 0.0
    before = [v.numpy().tolist() for v in model.trainable_variables]
    for slot in model.optimizer.variables[2:]:
        slot.assign(tf.zeros(slot.shape))
    model.fit(X, Y, batch_size=BATCH, epochs=1, verbose=0, callbacks=[trace])
    results["stays"] = distance(before, trace.values[-1])
    return results


class Notes(keras.layers.Layer):
    """Passes its input through and notes it in training."""

    seen: list[list[int]] = []

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return inputs
        with tf.control_dependencies([tf.numpy_function(self.note, [inputs], tf.float32)]):
            return tf.identity(inputs)

    @classmethod
    def note(cls, inputs: np.ndarray) -> np.float32:
        cls.seen.append([int(i) for i in inputs[:, 0]])
        return np.float32(0)


def given(strategy: tf_syncdist.ModelAveragingStrategy) -> dict[str, Any]:
    """Notes which examples this worker's learners were given in fits of all kinds."""
    x = np.arange(50, dtype="float32")[:, None]
    y = np.zeros_like(x)
    with strategy.scope():
        model = keras.Sequential([Notes(), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-6), "mse")
    examples = tf.data.Dataset.from_tensor_slices((x, y))
    results = {}

    def fit(name: str, *args: Any, **kwargs: Any) -> None:
        Notes.seen.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = strategy.local_report().rounds
            model.fit(*args, verbose=0, **kwargs)
        results[name] = {
            "seen": list(Notes.seen),
            "runs": strategy.local_report().rounds - before,
            "warnings": [str(w.message) for w in caught if "ran out" in str(w.message)],
        }

    fit("arrays", x, y, batch_size=8, epochs=2)
    fit("dataset", examples.shuffle(50).batch(8), epochs=2)
    fit("whole", examples.take(48).batch(8), epochs=1)
    ragged = examples.map(lambda a, b: (tf.expand_dims(a, 0), tf.expand_dims(b, 0)))
    fit("no_batch_size", ragged.take(12).filter(lambda a, b: True).batch(1).unbatch(), epochs=1)
    fit("steps", examples.repeat().batch(8), epochs=2, steps_per_epoch=3)
    fit("unknown", examples.filter(lambda a, b: a[0] < 40).batch(8), epochs=2)
    Notes.seen.clear()
    model.train_on_batch(x[:8], y[:8])
    results["train_on_batch"] = {"seen": list(Notes.seen)}
    return results


def loops(strategy: tf_syncdist.ModelAveragingStrategy) -> dict[str, Any]:
    """Trains in custom loops, in a graph and as the user has written it."""
    results = {}
    for name in ("graph", "eager"):
        with strategy.scope():
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

        call = tf.function(step) if name == "graph" else step
        dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
        losses = [float(call(batch)) for batch in strategy.experimental_distribute_dataset(dataset)]
        reference = Reference(lambda: dense(sgd), weights, strategy.num_learners)
        each = strategy.num_learners // strategy.num_workers
        for batches in dealt(PARTS, strategy.num_workers, each, len(losses)):
            reference.step(batches)
        values = [v.numpy().tolist() for v in model.trainable_variables]
        results[name] = {
            "difference": distance(reference.values(), values),
            "runs": len(losses),
            "losses": losses,
        }
    return results


def statistics(strategy: tf_syncdist.ModelAveragingStrategy) -> dict[str, Any]:
    """Trains with batch normalisation; the statistics of learners are not alike."""
    with strategy.scope():
        keras.utils.set_random_seed(1)
        norm = keras.layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((6,)), norm, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
    seen = []

    class After(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            seen.append(norm.moving_mean.numpy().tolist())

    history = model.fit(
        X, Y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[After()]
    )
    each = strategy.num_learners // strategy.num_workers
    means = np.zeros((strategy.num_learners, 6))
    expected = []
    for batches in dealt(PARTS, strategy.num_workers, each, len(seen)):
        means = 0.5 * means + 0.5 * np.array([b[0].mean(0) for b in batches])
        mine = means[strategy.worker_index * each :][:each]
        expected.append(mine.mean(0))
    return {
        "difference": distance(expected, seen),
        "at_the_end": distance([means.mean(0)], [norm.moving_mean.numpy()]),
        "logs": {k: v[-1] for k, v in history.history.items()},
    }


def tuned(learners: str) -> dict[str, Any]:
    """Lets `fit` find out how many learners there are to be, and trains with them."""
    strategy = strategy_of(learners)
    first = trajectory(strategy)
    return {"learners": strategy.num_learners, "again": trajectory(strategy), **first}


def refusals() -> dict[str, str]:
    """Returns what is said of arguments that cannot be."""
    wrong = {
        "no_learners": {"learners_per_device": 0},
        "word": {"learners_per_device": "many"},
        "no_correction": {"correction": 0.0},
        "momentum": {"central_momentum": 1.0},
        "period": {"period": 0},
    }
    said = {}
    for name, arguments in wrong.items():
        try:
            tf_syncdist.ModelAveragingStrategy(**arguments)
        except ValueError as e:
            said[name] = str(e)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tf_syncdist.ModelAveragingStrategy(4, correction=0.5)
        said["unstable"] = str(caught[-1].message)
        tf_syncdist.ModelAveragingStrategy(4, correction=0.3)
        said["count"] = str(len(caught))
    return said


def alone() -> dict[str, Any]:
    results: dict[str, Any] = {"alike_plain": alike_plain(strategy_of(1))}
    results["two"] = trajectory(strategy_of(2))
    for optimizer in ("adam", "accumulating", "scaled", "dropping"):
        results[optimizer] = trajectory(strategy_of(3), optimizer)
    results["period"] = trajectory(strategy_of(3, period=3), period=3)
    rule = {"central_momentum": 0.0, "correction": 0.1}
    results["weak"] = trajectory(strategy_of(2, **rule), momentum=0.0, correction=0.1)
    results["central_only"] = central_only(strategy_of(2))
    results["given"] = given(strategy_of(2))
    results["loops"] = loops(strategy_of(2))
    results["statistics"] = statistics(strategy_of(3))
    results["tuned"] = tuned("auto")
    results["refusals"] = refusals()
    return results


def on_devices() -> dict[str, Any]:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = strategy_of(2)
    return {"learners": strategy.num_learners, **trajectory(strategy)}


def together() -> dict[str, Any]:
    strategy = strategy_of(task.ARGUMENTS["learners"])
    results = {"trajectory": trajectory(strategy)}
    results["adam"] = trajectory(strategy, "adam")
    results["central_only"] = central_only(strategy)
    results["statistics"] = statistics(strategy)
    results["given"] = given(strategy)
    results["loops"] = loops(strategy)
    results |= task.counts(strategy)
    return results


case = task.ARGUMENTS["case"]
index = 0
if case == "together":
    found = together()
    index = int(__import__("json").loads(os.environ["TF_CONFIG"])["task"]["index"])
else:
    found = {"alone": alone, "on_devices": on_devices}[case]()
task.write(index, found)
