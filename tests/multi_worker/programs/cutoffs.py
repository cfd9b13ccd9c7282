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


class Regimes(keras.layers.Layer):
    """Takes as long in training as a machine that others use, too."""

    def __init__(self, usual_seconds: float, slow_seconds: float) -> None:
        super().__init__()
        self._usual_seconds = usual_seconds
        self._slow_seconds = slow_seconds
        self._steps = 0

    def _wait(self) -> None:
        self._steps += 1
        is_slow = self._steps % 12 > 7
        time.sleep(self._slow_seconds if is_slow else self._usual_seconds)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return task.after(inputs, self._wait) if training else inputs


class Together(keras.callbacks.Callback):
    """Lets nobody be more than some rounds behind, so that a stalled worker has its turns, too."""

    def __init__(self, strategy: tf_syncdist.SyncReplicasStrategy) -> None:
        super().__init__()
        self._strategy = strategy
        self._batches = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self._batches % 10 == 0:
            task.meet(self._strategy, f"together_{self._batches}")
        self._batches += 1


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
        usual, slow = arguments["seconds"]
        regimes = Regimes(usual, slow if worker == arguments["slow"] else usual)
        layers = [keras.Input((16,)), regimes]
        layers += [keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)]
        model = keras.Sequential(layers)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    history = model.fit(
        x,
        y,
        batch_size=BATCH_SIZE,
        epochs=arguments["epochs"],
        verbose=0,
        callbacks=[Together(strategy)],
    )
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
