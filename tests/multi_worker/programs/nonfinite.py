"""Trains while the gradients of some workers are not finite in some of their runs."""

from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 12
STEPS = 12
# In which of its computed runs a worker's gradients are not finite.
SOME = {1: (0, 3, 4, 9)}
ALL = {0: (2, 5), 1: (2, 5, 7), 2: (2, 5, 11)}


class Spoils(keras.layers.Layer):
    """Lets gradients be NaN in some of the runs that are computed.

    Args:
        runs: In which.
    """

    def __init__(self, runs: tuple[int, ...]) -> None:
        super().__init__(dtype="float32")
        self.runs = runs
        self.run = -1

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return inputs

        def factor() -> np.float32:
            self.run += 1
            return np.float32(np.nan if self.run in self.runs else 1.0)

        @tf.custom_gradient
        def identity(value: tf.Tensor) -> tuple:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return upstream * tf.numpy_function(factor, [], tf.float32)

            return tf.identity(value), gradient

        return identity(inputs)


def cases() -> dict[str, dict[str, Any]]:
    """Returns what to train with, by name."""
    if task.ARGUMENTS["nonfinite"] == "error":
        return {"error": {"runs": {1: (5,)}}}
    return {
        "some": {"runs": SOME},
        "all": {"runs": ALL},
        "eager": {"runs": ALL, "eager": True},
        "accumulation": {"runs": SOME, "accumulate": 2},
        # All workers skip these updates together; nothing is kept back.
        "scaled": {"runs": SOME, "scale": 2.0**10},
    }


def train(strategy: Any, number: int, case: dict[str, Any]) -> dict[str, Any]:
    keras.utils.set_random_seed(number)
    random = np.random.RandomState(number)
    x = random.randint(0, 20, (BATCH_SIZE * STEPS, 4))
    y = (x[:, :1] * x[:, 1:2] / 100).astype("float32")
    with strategy.scope():
        inputs = keras.Input((4,), dtype="int32")
        hidden = keras.layers.Flatten()(keras.layers.Embedding(20, 6)(inputs))
        hidden = keras.layers.Dense(8, activation="tanh", name="spoilt")(hidden)
        hidden = Spoils(case["runs"].get(strategy.worker_index, ()))(hidden)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=case.get("accumulate"))
        if "scale" in case:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, case["scale"], 4)
        model.compile(optimizer, "mse", run_eagerly=case.get("eager", False))
    before = strategy.local_report()
    start = [w.copy() for w in model.get_weights()]
    model.fit(x, y, batch_size=BATCH_SIZE, shuffle=False, verbose=0)
    after = strategy.local_report()
    result = {
        "finite": all(bool(np.all(np.isfinite(w))) for w in model.get_weights()),
        "moved": max(
            float(np.max(np.abs(a - b))) for a, b in zip(start, model.get_weights(), strict=True)
        ),
        "updates": int(optimizer.iterations.numpy()),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
    }
    for name in ("rounds", "contributed", "late", "replayed", "nonfinite"):
        result[name] = getattr(after, name) - getattr(before, name)
    return result


def main() -> None:
    ends = task.ARGUMENTS["nonfinite"] == "error"
    strategy = tf_syncdist.SyncReplicasStrategy(
        backup_workers=task.ARGUMENTS["backup_workers"],
        nonfinite=task.ARGUMENTS["nonfinite"],
        # Those that are left when one has ended go on.
        **task.patience(1 if ends else task.ARGUMENTS["backup_workers"]),
    )
    results: dict[str, Any] = {}
    for number, (name, case) in enumerate(cases().items()):
        results[name] = train(strategy, number, case)
        if name != "error":
            task.meet(strategy, f"after_{name}")
    if "error" not in results:
        results |= task.counts(strategy)
    task.write(strategy.worker_index, results)


main()
