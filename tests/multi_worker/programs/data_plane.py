"""Trains a model with an embedding whose gradients travel as the arguments say."""

import hashlib
import time
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist
from tf_syncdist.transport.session import Session

BATCH_SIZE = 24
STEPS = 8
EPOCHS = 3
WORDS = 2000

random = np.random.RandomState(3)
words = random.randint(0, 40, (BATCH_SIZE * STEPS, 6))
targets = np.sin(words).sum(1, keepdims=True).astype("float32")


events: list[str] = []


class SlowGradient(keras.layers.Layer):
    """Takes its time in backpropagation, and notes when it has."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if not task.ARGUMENTS.get("gradient_seconds"):
            return inputs

        @tf.custom_gradient
        def identity(x: tf.Tensor) -> tuple:
            return tf.identity(x), slow

        return identity(inputs)


def slow(upstream: tf.Tensor) -> tf.Tensor:
    def wait(value: np.ndarray) -> np.ndarray:
        time.sleep(task.ARGUMENTS["gradient_seconds"])
        events.append("gradient")
        return value

    # Stateful operations are executed one after the other, so this one must not seem to be one.
    result = tf.numpy_function(wait, [upstream], upstream.dtype, stateful=False)
    result.set_shape(upstream.shape)
    return result


def note_sends() -> None:
    """Notes whenever values are handed to a session."""
    send = Session.send

    def noted(*args: Any, **kwargs: Any) -> None:
        events.append("send")
        send(*args, **kwargs)

    Session.send = noted


def build() -> keras.Model:
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(WORDS, 8),
            keras.layers.Flatten(),
            SlowGradient(),
            keras.layers.Dense(64, activation="tanh"),
            task.Pause(task.ARGUMENTS.get("pause_seconds", 0.0)),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


def train(model: keras.Model) -> dict[str, object]:
    data = tf.data.Dataset.from_tensor_slices((words, targets)).batch(BATCH_SIZE)
    history = model.fit(data, epochs=EPOCHS, verbose=0).history
    weights = [w.numpy() for w in model.weights]
    return {
        "weights_sha256": hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest(),
        "weights": [w.tolist() for w in weights[2:]],
        "embedding": weights[0][:40].tolist(),
        "untouched": float(np.abs(weights[0][40:]).sum()),
        "loss": history["loss"],
    }


def main() -> None:
    if task.ARGUMENTS.get("plain"):
        task.write(0, train(build()))
        return
    note_sends()
    given = task.ARGUMENTS["strategy"]
    patience = task.patience(given.get("backup_workers", 0))
    strategy = tf_syncdist.SyncReplicasStrategy(**(patience | given))
    with strategy.scope():
        model = build()
    results = train(model)
    task.write(
        strategy.worker_index,
        results | {"events": events, "local": strategy.local_report()._asdict()},
    )


main()
