"""Trains layers that take their time, with gradients that travel as the arguments say."""

import time
from collections.abc import Callable

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist
from tf_syncdist import propagation

LAYERS = 4
ELEMENTS = 250_000
PASS_SECONDS = 0.1

_NAMES = {
    "fifo": propagation.FifoPropagation,
    "auto": propagation.AutoPropagation,
    "priority": propagation.PriorityPropagation,
}


def _pause(value: np.ndarray) -> np.ndarray:
    time.sleep(PASS_SECONDS / LAYERS)
    return value


@tf.custom_gradient
def layer(x: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    # Without a state, so that TensorFlow keeps to no order but that of the data.
    y = tf.numpy_function(_pause, [x + weights[0]], tf.float32, stateful=False)
    y.set_shape(())

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        dx = tf.numpy_function(_pause, [upstream], tf.float32, stateful=False)
        dx.set_shape(())
        return dx, tf.fill([ELEMENTS], dx * x)

    return y, gradient


given = dict(task.ARGUMENTS["propagation"])
strategy = tf_syncdist.SyncReplicasStrategy(
    propagation=_NAMES[given.pop("name")](**given),
    **task.ARGUMENTS.get("strategy", {}),
    **(task.patience() | {"bucket_bytes": None}),
)
with strategy.scope():
    variables = [
        keras.Variable(np.full(ELEMENTS, 0.1, "float32"), name=f"layer_{n}") for n in range(LAYERS)
    ]
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
    optimizer.build(variables)


def step() -> None:
    with tf.GradientTape() as tape:
        x = tf.constant(1.0 + strategy.worker_index)
        for variable in variables:
            x = layer(x, tf.convert_to_tensor(variable.value))
        loss = x * x
    optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)


@tf.function
def run() -> None:
    strategy.run(step)


for _ in range(task.ARGUMENTS["steps"]):
    run()
task.write(strategy.worker_index, {"weights_sha256": tf_syncdist.variables_sha256(variables)})
