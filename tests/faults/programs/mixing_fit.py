"""Trains twice with Keras' fit and a centre, whatever happens."""

import os
import time
from pathlib import Path
from typing import Any

import keras
import member
import numpy as np

import tf_syncdist

ARGUMENTS = member.ARGUMENTS
BATCH_SIZE = 12
LIFE = os.environ["TF_SYNCDIST_TEST_LIFE"]


class Note(keras.callbacks.Callback):
    """Notes every run; the worker that will be killed waits for another before that."""

    def __init__(self) -> None:
        super().__init__()
        self._file = open(f"{LIFE}.trace", "a", buffering=1)
        self._runs = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self._runs += 1
        if self._runs == ARGUMENTS["killed_at"] and Path(LIFE).name == ARGUMENTS["killed"]:
            member.wait_for(ARGUMENTS["stays"], ARGUMENTS["killed_at"])
        self._file.write(f"{self._runs} {logs['loss']}\n")
        if self._runs == ARGUMENTS["killed_at"] and Path(LIFE).name == ARGUMENTS["killed"]:
            member.hold("its end")
        if self._runs == ARGUMENTS["held_at"] and Path(LIFE).name == ARGUMENTS["stays"]:
            # Whoever comes again does not find that all is over.
            member.wait_for(ARGUMENTS["comes_again"], 1)
        time.sleep(ARGUMENTS["step_seconds"])


def main() -> None:
    strategy: Any = tf_syncdist.ElasticAveragingStrategy(
        connect_timeout_seconds=60.0, timeout_seconds=60.0, detection_seconds=1.0
    )
    x = np.random.RandomState(1).randn(BATCH_SIZE * ARGUMENTS["batches"], 16).astype("float32")
    y = x[:, :4].argmax(1)
    keras.utils.set_random_seed(strategy.worker_index)
    with strategy.scope():
        model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-2), loss)
    note = Note()
    epochs, ends, stopped = [], [], []
    for _ in range(2):
        fit = {"batch_size": BATCH_SIZE, "epochs": ARGUMENTS["epochs"], "verbose": 0}
        history = model.fit(x, y, callbacks=[note], **fit)
        epochs.append(history.epoch)
        ends.append(model.evaluate(x, y, verbose=0))
        stopped.append(model.stop_training)
    member.write(strategy, model, model.optimizer, epochs=epochs, ends=ends, stopped=stopped)


main()
