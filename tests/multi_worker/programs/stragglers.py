"""Trains with one slow worker, then lets single workers evaluate, predict, save and load alone."""

import pathlib
import time
import warnings

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 32
EXAMPLES = 630  # 20 batches, the last one smaller.
MAX_EPOCHS = 5


class Pause(keras.layers.Layer):
    """Takes its time in training."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return task.slowly(inputs, self.seconds) if training else inputs


class CountBatches(keras.callbacks.Callback):
    """Counts the batches of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.announced: list[int] = []
        self.ends: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.seen.append(0)
        self.announced.append(self.params["steps"])

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.seen[-1] += 1
        self.ends.append(time.monotonic())


def make_model(seconds: float) -> keras.Model:
    inputs = keras.Input((16,))
    hidden = keras.layers.Dense(32, activation="relu")(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    outputs = keras.layers.Dense(4)(Pause(seconds)(hidden) if seconds else hidden)
    return keras.Model(inputs, outputs)


def main() -> None:
    arguments = task.ARGUMENTS
    strategy = tf_syncdist.SyncReplicasStrategy(backup_workers=1, **task.patience(1))
    worker = strategy.worker_index
    keras.utils.set_random_seed(7)
    x = np.random.RandomState(1).randn(EXAMPLES, 16).astype("float32")
    y = x[:, :4].argmax(1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with strategy.scope():
        model = make_model(arguments["delay_seconds"] if worker == arguments["slow"] else 0.0)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])

    count = CountBatches()
    fit = {"batch_size": BATCH_SIZE, "validation_data": (x, y)}
    first = model.fit(x, y, epochs=2, callbacks=[count], **fit)
    # Only an improvement by 100 would count as one, so training stops after its second epoch.
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", min_delta=100.0, patience=0)
    second = model.fit(x, y, epochs=MAX_EPOCHS, callbacks=[count, stop], **fit)
    results = {
        "histories": [first.history, second.history],
        "seen": count.seen,
        "typical_seconds": float(np.median(np.diff(count.ends))),
        "announced": count.announced,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
        "statistics_sha256": tf_syncdist.variables_sha256(model.non_trainable_variables),
        **task.counts(strategy),
    }

    logits = model(x).numpy()
    results["full_loss"] = float(loss(y, logits))
    results["full_accuracy"] = float(np.mean(logits.argmax(1) == y))
    if worker == 1:
        results["evaluated"] = model.evaluate(x, y, batch_size=50, return_dict=True)
        predicted = model.predict(x, batch_size=50)
        results["predicted_shape"] = predicted.shape
        results["predicted_difference"] = float(np.max(np.abs(predicted - logits)))
    if worker == 0:
        path = pathlib.Path(arguments["directory"]) / "model.keras"
        model.save(path)
        loaded = keras.models.load_model(path, compile=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras 3.10 warns of any input of a loaded model.
            results["loaded_difference"] = float(np.max(np.abs(loaded(x).numpy() - logits)))
    task.write(worker, results)


main()
