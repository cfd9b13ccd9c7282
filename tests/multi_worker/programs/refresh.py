"""Trains with a worker that pauses once and falls further behind than results are kept."""

import pathlib
import time

import keras
import numpy as np
import task

import tf_syncdist

BATCH_SIZE = 32
STEPS = 40
PAUSE_AFTER = 5

DIRECTORY = pathlib.Path(task.ARGUMENTS["directory"])
RESUMED = DIRECTORY / "resumed"


class Pauses(keras.callbacks.Callback):
    """Counts batches, and lets one worker pause until the others have gone on far enough.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: tf_syncdist.SyncReplicasStrategy) -> None:
        super().__init__()
        self.strategy = strategy
        self.batches = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        # When the paused worker goes on, the others give it time for each round. Not any time:
        # while this one waits here it gives nobody its state.
        if self.strategy.worker_index == 1 and RESUMED.exists():
            deadline = time.monotonic() + 2.5
            while not (DIRECTORY / f"done-{batch}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.batches += 1
        if self.strategy.worker_index == task.ARGUMENTS["paused"]:
            (DIRECTORY / f"done-{batch}").touch()
            if self.batches == PAUSE_AFTER:
                deadline = time.monotonic() + 100.0
                while self.strategy.report().rounds < task.ARGUMENTS["until_round"]:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                RESUMED.touch()


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
    pauses = Pauses(strategy)
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
