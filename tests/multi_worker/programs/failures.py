"""Trains until one worker comes to a bad end; the others go on."""

import os
import signal
import time

import keras
import numpy as np
import task

import tf_syncdist

BATCH_SIZE = 32
STEPS = 20


class Pause(keras.callbacks.Callback):
    """Makes every step take its time."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        time.sleep(task.ARGUMENTS["step_seconds"])


class BadEnd(keras.callbacks.Callback):
    """Ends this worker in the middle of the second epoch."""

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (self.epoch, batch) != (1, STEPS // 2):
            return
        if task.ARGUMENTS["signal"]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise FloatingPointError("this worker has had enough")


def main() -> None:
    seconds = task.ARGUMENTS.get("connect_timeout_seconds", 25.0)
    strategy = tf_syncdist.SyncReplicasStrategy(
        task.ARGUMENTS["backup_workers"], **task.PATIENCE | {"connect_timeout_seconds": seconds}
    )
    worker = strategy.worker_index
    keras.utils.set_random_seed(worker)
    x = np.random.RandomState(1).randn(BATCH_SIZE * STEPS, 16).astype("float32")
    y = x[:, :4].argmax(1)
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    callbacks = [Pause(), *([BadEnd()] if worker == task.ARGUMENTS["failing"] else [])]
    fit = {"batch_size": BATCH_SIZE, "epochs": 4, "shuffle": False, "validation_data": (x, y)}
    history = model.fit(x, y, callbacks=callbacks, **fit).history
    results = {
        "history": history,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
        "local": strategy.local_report()._asdict(),
    }
    task.write(worker, results)


main()
