"""Tries what cannot work with several workers; every worker is told why, and training goes on."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

x = np.ones((32, 4), "float32")
y = np.ones((32, 1), "float32")

strategy = tf_syncdist.SyncReplicasStrategy(**task.PATIENCE)
worker = strategy.worker_index
results: dict[str, Any] = {}


def record(name: str, mistake: Callable[[], object]) -> None:
    try:
        mistake()
    except Exception as e:  # noqa: BLE001 - which one it is, is what the test looks at
        results[name] = {"kinds": [k.__name__ for k in type(e).__mro__], "message": str(e)}
    else:
        results[name] = {"kinds": [], "message": "there was no error"}


def layers() -> list[Any]:
    return [keras.Input((4,)), keras.layers.Dense(1)]


def fit(model: keras.Model, **kwargs: Any) -> Any:
    return model.fit(x, y, batch_size=8, verbose=0, **kwargs)


def compiled(**kwargs: Any) -> keras.Model:
    with strategy.scope():
        model = keras.Sequential(layers())
        model.compile(keras.optimizers.SGD(0.1), "mse", **kwargs)
    return model


def outside() -> None:
    model = keras.Sequential(layers())
    model.compile("sgd", "mse")
    record("model_outside", lambda: fit(model))
    record("model_outside_on_batch", lambda: model.train_on_batch(x, y))

    def fit_within() -> None:
        with strategy.scope():
            fit(model)

    record("fit_within_scope_only", fit_within)
    with strategy.scope():
        inside = keras.Sequential(layers())
    inside.compile("sgd", "mse")
    record("compiled_outside", lambda: fit(inside))
    optimizer = keras.optimizers.Adam()
    with strategy.scope():
        other = keras.Sequential(layers())
        other.compile(optimizer, "mse")
    record("optimizer_outside", lambda: fit(other))


def in_loop(
    extra: Callable[[tf.Tensor], Any], jit_compile: bool | None = None
) -> Callable[[], object]:
    """Returns a training run in a custom loop that does something else besides."""
    model = compiled()

    def replica_step(inputs: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(inputs))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return extra(loss)

    @tf.function(jit_compile=jit_compile)
    def step(inputs: tf.Tensor) -> Any:
        strategy.run(replica_step, args=(inputs,))

    return lambda: step(tf.constant(x))


def gather(loss: tf.Tensor) -> tf.Tensor:
    return tf.distribute.get_replica_context().all_gather(tf.reshape(loss, (1,)), axis=0)


def tensor_array(loss: tf.Tensor) -> tf.Tensor:
    array = tf.TensorArray(tf.float32, size=1).write(0, loss)
    return array.flow


def variant(loss: tf.Tensor) -> Any:
    return tf.data.experimental.to_variant(tf.data.Dataset.from_tensors(loss))


def main() -> None:
    record("jit_compile", lambda: fit(compiled(jit_compile=True)))
    jit = compiled(jit_compile=True)
    record("jit_compile_on_batch", lambda: jit.train_on_batch(x, y))
    outside()
    record("all_gather", in_loop(gather))
    record("jit_compile_in_loop", in_loop(tf.identity, jit_compile=True))
    record("tensor_array", in_loop(tensor_array))
    record("variant", in_loop(variant))
    record("batch_size", lambda: compiled().fit(x, y, batch_size=9, verbose=0))
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(9)
    record("batch_of_dataset", lambda: compiled().fit(batches, verbose=0))
    shares = strategy.experimental_distribute_dataset(batches.rebatch(8))
    record("shares_evaluated", lambda: compiled().evaluate(shares, verbose=0))
    record("shares_as_validation", lambda: fit(compiled(), validation_data=shares))
    record(
        "batch_of_validation",
        lambda: fit(compiled(), validation_data=(x[:9], y[:9]), validation_batch_size=9),
    )
    model = compiled()
    results["goes_on"] = {
        "loss": fit(model, epochs=2).history["loss"],
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
    }
    # A model that each worker trains on its own, as the error says.
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        alone = keras.Sequential(layers())
        alone.compile("sgd", "mse")
    results["alone"] = len(fit(alone).history["loss"])
    task.write(worker, results)


main()
