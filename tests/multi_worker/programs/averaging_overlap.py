"""Trains with model averaging through a thin network, with steps that take a known time."""

import time
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

STEPS = 12
PATIENCE = {k: v for k, v in task.patience().items() if k != "bucket_bytes"}
strategy = tf_syncdist.ModelAveragingStrategy(**PATIENCE, transport="grpc")
pause_seconds = 0.0


class Waiting(keras.layers.Layer):
    """Waits in training for as long as it is told to."""

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not tf.is_symbolic_tensor(inputs):
            return inputs
        return task.after(inputs, lambda: time.sleep(pause_seconds))


with strategy.scope():
    # 800 kB.
    layers = [keras.Input((400,)), Waiting(), keras.layers.Dense(500)]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-6), "mse")

x = np.random.RandomState(0).randn(2 * STEPS, 400).astype("float32")


def seconds(pause: float, gbps: float) -> float:
    """Returns how long a step takes, the median of some."""
    global pause_seconds
    task.meet(strategy, f"{pause} {gbps}")
    pause_seconds, strategy.limit_gbps = pause, gbps
    begins: list[float] = []
    note: Any = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: begins.append(time.monotonic())
    )
    model.fit(x, x[:, :1], batch_size=1, verbose=0, callbacks=[note])
    return float(np.median(np.diff(begins)))


PAUSE, GBPS = task.ARGUMENTS["pause_seconds"], task.ARGUMENTS["gbps"]
seconds(0.0, 0.0)
task.write(
    strategy.worker_index,
    {
        "compute": seconds(PAUSE, 0.0),
        "exchange": seconds(0.0, GBPS),
        "both": seconds(PAUSE, GBPS),
    },
)
