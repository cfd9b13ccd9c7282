"""Trains with a worker that pauses once and falls further behind than results are kept."""

import time

import keras
import numpy as np
import task

import tf_syncdist

BATCH_SIZE = 32
STEPS = 40


class Pauses(keras.callbacks.Callback):
    """Pauses after batches, and counts them.

    Args:
        seconds: After each of the first batches; the last number holds for all that follow.
    """

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.seconds = seconds
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        time.sleep(self.seconds[min(self.batches, len(self.seconds) - 1)])
        self.batches += 1


def main() -> None:
    strategy = tf_syncdist.SyncReplicasStrategy(
        backup_workers=1, history_rounds=1, history_bytes=0, **task.PATIENCE
    )
    keras.utils.set_random_seed(strategy.worker_index)
    x = np.random.RandomState(1).randn(BATCH_SIZE * STEPS, 16).astype("float32")
    y = x[:, :4].argmax(1)
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    paused = strategy.worker_index == task.ARGUMENTS["paused"]
    pauses = Pauses(task.ARGUMENTS["pauses"] if paused else [task.ARGUMENTS["step_seconds"]])
    history = model.fit(x, y, batch_size=BATCH_SIZE, shuffle=False, callbacks=[pauses]).history
    results = {
        "history": history,
        "batches": pauses.batches,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
        "iterations": int(model.optimizer.iterations.numpy()),
        "local": strategy.local_report()._asdict(),
    }
    task.write(strategy.worker_index, results)


main()
