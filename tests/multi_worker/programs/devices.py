"""Trains on several logical devices per worker, and tries what these cannot do."""

import contextlib

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 32
STEPS = 6


def classifier(dropout: float = 0.0, normalise: bool = False) -> keras.Model:
    layers = [keras.Input((8,)), keras.layers.Dense(16, activation="tanh")]
    layers += [keras.layers.BatchNormalization()] if normalise else []
    layers += [keras.layers.Dropout(dropout)] if dropout else []
    return keras.Sequential([*layers, keras.layers.Dense(4)])


def main() -> None:
    devices = task.ARGUMENTS["devices"]
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * devices
    )
    plain = task.ARGUMENTS["plain"]
    backup = task.ARGUMENTS.get("backup_workers", 0)
    strategy = None
    if not plain:
        strategy = tf_syncdist.SyncReplicasStrategy(backup_workers=backup, **task.PATIENCE)
    worker = 0 if plain else strategy.worker_index
    random = np.random.RandomState(1)
    x = random.randn(BATCH_SIZE * STEPS, 8).astype("float32")
    y = x[:, :4].argmax(1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    results = {}
    cases = {
        "sgd": (classifier, lambda: keras.optimizers.SGD(0.1, momentum=0.9)),
        "adam": (classifier, lambda: keras.optimizers.Adam(0.01)),
        "float16": (
            classifier,
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
        ),
        "normalised": (lambda: classifier(normalise=True), lambda: keras.optimizers.SGD(0.1)),
        "dropout": (lambda: classifier(dropout=0.5), lambda: keras.optimizers.SGD(0.1)),
    }
    for number, (name, (build, optimizer)) in enumerate(cases.items()):
        keras.utils.set_random_seed(number)
        with contextlib.nullcontext() if plain else strategy.scope():
            model = build()
            model.compile(
                optimizer(), loss, metrics=["accuracy"], steps_per_execution=1 + number % 2
            )
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)
        history = model.fit(data, epochs=2, verbose=0).history
        results[name] = {
            "history": history,
            "weights": [w.tolist() for w in model.get_weights()],
            "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
            "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
            "statistics_sha256": tf_syncdist.variables_sha256(
                [v for v in model.non_trainable_variables if "seed" not in v.path]
            ),
        }
        if strategy:
            results[name]["rounds"] = strategy.local_report().rounds
            copies = [
                strategy.experimental_local_results(v.value) for v in model.trainable_variables
            ]
            results[name]["devices_alike"] = all(
                np.array_equal(c[0], other) for c in copies for other in c
            )
    if strategy and devices > 1:
        with strategy.scope():
            model = classifier()
            model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), loss)
        try:
            model.fit(x, y, batch_size=BATCH_SIZE, verbose=0)
        except NotImplementedError as e:
            results["accumulation_error"] = str(e)
    task.write(worker, results)


main()
