"""Trains until one worker comes to a bad end; the others go on."""

import os
import pathlib
import signal
import time

import keras
import numpy as np
import task

import tf_syncdist

BATCH_SIZE = 32
STEPS = 20


ENDED = pathlib.Path(task.ARGUMENTS["directory"]) / "ended"


def has_ended() -> bool:
    """Returns whether the one that comes to a bad end has; who raises may be on its way still."""
    pid = ENDED.read_text() if ENDED.exists() else ""
    return bool(pid) and not (task.ARGUMENTS["signal"] and pathlib.Path(f"/proc/{pid}").exists())


class BadEnd(keras.callbacks.Callback):
    """Ends one worker in the middle of the second epoch; the others do not end theirs before."""

    def __init__(self, is_mine: bool) -> None:
        super().__init__()
        self.is_mine = is_mine

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if not self.is_mine and (self.epoch, batch) == (1, STEPS - 2):
            deadline = time.monotonic() + 100
            while not has_ended():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        if not self.is_mine or (self.epoch, batch) != (1, STEPS // 2):
            return
        ENDED.write_text(str(os.getpid()))
        if task.ARGUMENTS["signal"]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise FloatingPointError("this worker has had enough")


def main() -> None:
    strategy = tf_syncdist.SyncReplicasStrategy(
        task.ARGUMENTS["backup_workers"],
        **task.PATIENCE | {"min_workers": task.ARGUMENTS.get("min_workers", 1)},
    )
    task.wait_less(strategy, 10.0)
    worker = strategy.worker_index
    keras.utils.set_random_seed(worker)
    x = np.random.RandomState(1).randn(BATCH_SIZE * STEPS, 16).astype("float32")
    y = x[:, :4].argmax(1)
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    callbacks = [BadEnd(worker == task.ARGUMENTS["failing"])]
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
