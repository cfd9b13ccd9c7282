"""Workers that end in ways of their own: one trains in a thread, one has a handler for SIGTERM."""

import os
import signal
import threading
import time

import keras
import numpy as np
import task

import tf_syncdist

STEPS = 4
BATCH_SIZE = 12
seen: list[int] = []


class Signalled(keras.callbacks.Callback):
    """Has SIGTERM sent to this process, before the end of the first epoch."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch == 1 and not seen:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)


def train() -> None:
    strategy = tf_syncdist.SyncReplicasStrategy(**task.PATIENCE)
    worker = strategy.worker_index
    x = np.random.RandomState(0).randn(BATCH_SIZE * STEPS, 3).astype("float32")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("adam", "mse")
    callbacks = [Signalled()] if worker else []
    fit = {"batch_size": BATCH_SIZE, "epochs": 2, "verbose": 0, "callbacks": callbacks}
    model.fit(x, x[:, :1], **fit)
    results = {
        "rounds": strategy.local_report().rounds,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "seen": seen,
    }
    task.write(worker, results)


def main() -> None:
    index = int(os.environ["TF_CONFIG"].rpartition('"index": ')[2].rstrip("} "))
    if index == 1:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    else:
        if index == 2:
            signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        train()


main()
