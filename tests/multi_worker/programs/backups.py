"""Trains with backups; the job may be killed as a whole, and go on from what it left behind."""

import os
import pathlib
import signal
import time

import keras
import numpy as np
import task

import tf_syncdist

BATCH_SIZE = 12
STEPS = 6
EPOCHS = 4

arguments = task.ARGUMENTS
backup_workers = arguments["backup_workers"]
strategy = tf_syncdist.SyncReplicasStrategy(
    backup_workers, deterministic=not backup_workers, **task.patience(backup_workers)
)
worker = strategy.worker_index
directory = pathlib.Path(arguments["directory"])
backups = directory / ("shared" if arguments["shared"] else f"own-{worker}")
x = np.random.RandomState(0).randn(BATCH_SIZE * STEPS, 5).astype("float32")
y = (x[:, :2] ** 2).astype("float32")


class Killed(keras.callbacks.Callback):
    """Kills all workers in the middle of an epoch; the one with the service last."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.at = (epoch, batch)
        self.epoch = -1

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (self.epoch, batch) != self.at:
            return
        (directory / f"dead-{worker}").touch()
        deadline = time.monotonic() + 100
        while not worker and len(list(directory.glob("dead-*"))) < strategy.num_workers:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3 * (not worker))
        os.kill(os.getpid(), signal.SIGKILL)


def build() -> keras.Model:
    # Every worker has weights of its own until they come from worker 0.
    keras.utils.set_random_seed(worker)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(6, activation="tanh"),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(2),
            ]
        )
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def main() -> None:
    model = build()
    epochs: list[int] = []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    callbacks = [
        tf_syncdist.callbacks.BackupAndRestore(
            backups, save_freq=arguments["save_freq"], keep=arguments["keep"]
        ),
        note,
    ]
    if arguments["kill_at"]:
        callbacks.append(Killed(*arguments["kill_at"]))
    fit = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, callbacks=callbacks, **fit)
    results = {
        "epochs": list(epochs),
        "rounds": strategy.local_report().rounds,
        "iterations": int(model.optimizer.iterations.numpy()),
        "loss": history.history["loss"],
        "weights_sha256": tf_syncdist.variables_sha256(model.variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
        "left": backups.exists(),
    }
    epochs.clear()
    again = model.fit(x, y, callbacks=callbacks, **fit | {"epochs": 1})
    results["again"] = {"epochs": epochs, "losses": len(again.history["loss"])}
    results["again"]["weights_sha256"] = tf_syncdist.variables_sha256(model.variables)
    task.write(worker, results)


main()
