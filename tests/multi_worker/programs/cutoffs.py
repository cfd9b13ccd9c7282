"""Trains with an adaptive cutoff and a worker that is slow for some steps on end, now and then."""

import pathlib
import time

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist
from tf_syncdist import cutoff

BATCH_SIZE = 24
STEPS = 30
USUAL_SECONDS = 0.05
SLOW_SECONDS = 0.4


class Regimes(keras.layers.Layer):
    """Takes as long in training as a machine that others use, too."""

    def __init__(self, is_slow: bool) -> None:
        super().__init__()
        self._is_slow = is_slow
        self._steps = 0

    def _wait(self) -> None:
        self._steps += 1
        slow = self._is_slow and self._steps % 12 > 7
        time.sleep(SLOW_SECONDS if slow else USUAL_SECONDS)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return task.after(inputs, self._wait) if training else inputs


def main() -> None:
    arguments = task.ARGUMENTS
    policy = getattr(cutoff, arguments["policy"])(**arguments["config"])
    strategy = tf_syncdist.SyncReplicasStrategy(
        cutoff=policy,
        record_trace=str(pathlib.Path(arguments["directory"]) / "trace.npz"),
        **task.PATIENCE,
    )
    worker = strategy.worker_index
    keras.utils.set_random_seed(7)
    x = np.random.RandomState(1).randn(BATCH_SIZE * STEPS, 16).astype("float32")
    y = x[:, :4].argmax(1)
    with strategy.scope():
        layers = [keras.Input((16,)), Regimes(worker == arguments["slow"])]
        layers += [keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)]
        model = keras.Sequential(layers)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    history = model.fit(x, y, batch_size=BATCH_SIZE, epochs=2, verbose=0)
    told = task.counts(strategy)
    report = strategy.report()
    results = {
        "history": history.history,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
        "replicas": strategy.num_replicas_in_sync,
        "directory": arguments["directory"],
        "cutoff": report.cutoff._asdict(),
        **told,
    }
    task.write(worker, results)


main()
