"""Trains on several logical devices per worker, and tries what these cannot do."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 32
STEPS = 6
# Not divisible by the number of devices, and no multiple of the batch size either.
TEST_EXAMPLES = 75

DEVICES = task.ARGUMENTS["devices"]
PLAIN = task.ARGUMENTS["plain"]
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES)
strategy = tf.distribute.get_strategy()
if not PLAIN:
    strategy = tf_syncdist.SyncReplicasStrategy(
        backup_workers=task.ARGUMENTS.get("backup_workers", 0),
        **task.patience(task.ARGUMENTS.get("backup_workers", 0)),
    )
worker = 0 if PLAIN else strategy.worker_index
pause = task.ARGUMENTS.get("pause_seconds", 0.0) if worker == 1 else 0.0

random = np.random.RandomState(1)
x = random.randn(BATCH_SIZE * STEPS, 8).astype("float32")
y = x[:, :4].argmax(1)
losses = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def scope() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if PLAIN else strategy.scope()


def classifier(
    dropout: float = 0.0, normalise: bool = False, policy: str = "float32"
) -> keras.Model:
    layers = [keras.Input((8,)), keras.layers.Dense(16, activation="tanh", dtype=policy)]
    layers += [task.FallsBehind(pause, strategy, dtype=policy)]
    layers += [keras.layers.BatchNormalization()] if normalise else []
    layers += [keras.layers.Dropout(dropout)] if dropout else []
    return keras.Sequential([*layers, keras.layers.Dense(4, dtype="float32")])


def sgd(**options: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.1, momentum=0.9, **options)


def describe(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, before: Any
) -> dict[str, Any]:
    found = {
        "weights": [w.tolist() for w in model.get_weights()],
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(optimizer.variables),
        "statistics_sha256": tf_syncdist.variables_sha256(
            [v for v in model.non_trainable_variables if "seed" not in v.path]
        ),
    }
    if not PLAIN:
        after = strategy.local_report()
        for name in ("rounds", "contributed", "late", "replayed"):
            found[name] = getattr(after, name) - getattr(before, name)
        copies = [
            strategy.experimental_local_results(v.value)
            for v in (*model.trainable_variables, *optimizer.variables)
        ]
        found["copies"] = sorted({len(c) for c in copies})
        found["devices_alike"] = all(np.array_equal(c[0], other) for c in copies for other in c)
    return found


def report() -> Any:
    return None if PLAIN else strategy.local_report()


def fits() -> dict[str, Any]:
    adam = keras.optimizers.Adam
    scaled = keras.optimizers.LossScaleOptimizer
    cases: dict[str, tuple[Callable, Callable]] = {
        "sgd": (classifier, sgd),
        "adam": (classifier, lambda: adam(0.01)),
        "scaled": (classifier, lambda: scaled(sgd(), dynamic_growth_steps=5)),
        "float16": (
            lambda: classifier(policy="mixed_float16"),
            lambda: scaled(sgd(), dynamic_growth_steps=5),
        ),
        "overflows": (
            lambda: classifier(policy="mixed_float16"),
            # The first steps overflow, so that the scale goes down.
            lambda: scaled(sgd(), initial_scale=2.0**24, dynamic_growth_steps=5),
        ),
        "normalised": (lambda: classifier(normalise=True), sgd),
        "dropout": (lambda: classifier(dropout=0.5), sgd),
    }
    results = {}
    for number, (name, (build, optimizer)) in enumerate(cases.items()):
        if name not in task.ARGUMENTS.get("only", cases):
            continue
        keras.utils.set_random_seed(number)
        before = report()
        with scope():
            model = build()
            model.compile(
                optimizer(), loss, metrics=["accuracy"], steps_per_execution=1 + number % 2
            )
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)
        history = model.fit(data, epochs=2, verbose=0).history
        results[name] = {"history": history, **describe(model, model.optimizer, before)}
        if name in ("scaled", "float16", "overflows"):
            results[name]["scale"] = float(model.optimizer.dynamic_scale.numpy())
        if name == "sgd":
            test = x[:TEST_EXAMPLES], y[:TEST_EXAMPLES]
            results[name] |= {
                "evaluated": model.evaluate(*test, batch_size=20, verbose=0, return_dict=True),
                "predicted": model.predict(test[0], batch_size=20, verbose=0).tolist(),
                "computed": model(test[0]).numpy().tolist(),
                "computed_loss": float(loss(test[1], model(test[0]))),
            }
    return results


def whole() -> Any:
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)
    return data if PLAIN else strategy.experimental_distribute_dataset(data)


def own() -> Any:
    """Returns a dataset that each worker makes of every so many examples."""
    data = tf.data.Dataset.from_tensor_slices((x, y))
    if PLAIN:
        return data.batch(BATCH_SIZE)

    def make(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = data.shard(context.num_input_pipelines, context.input_pipeline_id)
        if task.ARGUMENTS.get("backup_workers", 0):
            share = share.repeat().take(len(x))
        return share.batch(context.get_per_replica_batch_size(BATCH_SIZE))

    return strategy.distribute_datasets_from_function(make)


def loop(make_data: Callable[[], Any]) -> dict[str, Any]:
    keras.utils.set_random_seed(7)
    before = report()
    with scope():
        model = classifier()
        optimizer = sgd()
        optimizer.build(model.trainable_variables)
        accuracy = keras.metrics.SparseCategoricalAccuracy()

    def replica_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            value = tf.nn.compute_average_loss(losses(y, logits), global_batch_size=BATCH_SIZE)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        accuracy.update_state(y, logits)
        return tf.shape(x)[0]

    @tf.function
    def step(x: Any, y: Any) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(replica_step, args=(x, y)), axis=None)

    examples = [int(step(x, y)) for x, y in make_data()]
    return {
        "examples": examples,
        "accuracy": float(accuracy.result()),
        **describe(model, optimizer, before),
    }


def refused() -> dict[str, str]:
    """Tries what several devices cannot do."""
    cases = {
        "accumulation": lambda: sgd(gradient_accumulation_steps=2),
        "ema": lambda: sgd(use_ema=True, ema_overwrite_frequency=2),
    }
    found = {}
    for name, optimizer in cases.items():
        with strategy.scope():
            model = classifier()
            model.compile(optimizer(), loss)
        try:
            model.fit(x, y, batch_size=BATCH_SIZE, verbose=0)
            found[name] = "there was no error"
        except NotImplementedError as e:
            found[name] = str(e)
    return found


def main() -> None:
    # A program whose last training failed does not stay for the others, so this comes first.
    results = {"refused": refused()} if not PLAIN and DEVICES > 1 else {}
    results |= fits()
    results["whole"], results["own"] = loop(whole), loop(own)
    task.write(worker, results)


main()
