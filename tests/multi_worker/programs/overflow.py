"""Trains with scaled losses while the gradients of worker 1 overflow in some of its runs."""

import time
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 8
STEPS = 16
GROWTH_STEPS = 4
INITIAL_SCALE = 2.0**10
SOME = (2, 5, 6, 13)


class Overflows(keras.layers.Layer):
    """Lets gradients overflow in some of the runs that are computed, which begin with a pause.

    Args:
        runs: In which.
        pause: How long it is, in seconds.
    """

    def __init__(self, runs: tuple[int, ...], pause: float) -> None:
        super().__init__(dtype="float32")
        self.runs = runs
        self.pause = pause
        self.run = -1

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not self.runs:
            return inputs

        def begin() -> np.int64:
            self.run += 1
            if self.run in self.runs:
                time.sleep(self.pause)
            return np.int64(0)

        def factor() -> np.float32:
            return np.float32(np.inf if self.run in self.runs else 1.0)

        @tf.custom_gradient
        def identity(value: tf.Tensor) -> tuple:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return upstream * tf.numpy_function(factor, [], tf.float32)

            with tf.control_dependencies([tf.numpy_function(begin, [], tf.int64)]):
                return tf.identity(value), gradient

        return identity(inputs)


class SlowSGD(keras.optimizers.SGD):
    """Takes its time between knowing that gradients are finite and using them."""

    seconds = 0.0

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        first, *others = grads
        super().apply([task.slowly(first, self.seconds), *others], trainable_variables)


class Record(keras.callbacks.Callback):
    """Notes the state of the optimizer after every run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        optimizer = self.model.optimizer
        parts = (optimizer.dynamic_scale, optimizer.step_counter, optimizer.iterations)
        self.seen.append([float(p.numpy()) for p in parts])


def cases() -> dict[str, dict[str, Any]]:
    """Returns what to train with, by name."""
    if not task.ARGUMENTS["backup_workers"]:
        return {
            "graph": {"runs": SOME},
            "eager": {"runs": SOME, "eager": True},
            "accumulation": {"runs": SOME, "accumulate": 2},
            "never": {"runs": ()},
        }
    everywhere = tuple(range(STEPS))
    return {
        "slow": {"runs": everywhere, "pause": 0.15},
        # Worker 1's values would come between worker 0's word that all is finite, for which they
        # are late, and worker 0's own values.
        "between": {"runs": everywhere, "pause": 0.2, "apply": 0.4},
        "between_eager": {"runs": everywhere, "pause": 0.2, "apply": 0.4, "eager": True},
        # What is late and not finite in one run must not be in the sum of the next.
        "between_accumulation": {
            "runs": everywhere[::2],
            "pause": 0.2,
            "apply": 0.4,
            "accumulate": 2,
        },
    }


def train(strategy: Any, number: int, case: dict[str, Any]) -> dict[str, Any]:
    slow = strategy.worker_index == 1
    keras.utils.set_random_seed(number)
    random = np.random.RandomState(number)
    x = random.randn(BATCH_SIZE * STEPS, 6).astype("float32")
    y = (x[:, :3] * x[:, 3:]).astype("float32")
    keras.config.set_dtype_policy("mixed_float16")
    with strategy.scope():
        hidden = inputs = keras.Input((6,))
        hidden = keras.layers.Dense(8, activation="tanh")(hidden)
        hidden = Overflows(case["runs"] if slow else (), case.get("pause", 0.0))(hidden)
        model = keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(hidden))
        sgd = SlowSGD(0.05, momentum=0.9, gradient_accumulation_steps=case.get("accumulate"))
        sgd.seconds = 0.0 if slow else case.get("apply", 0.0)
        optimizer = keras.optimizers.LossScaleOptimizer(sgd, INITIAL_SCALE, GROWTH_STEPS)
        model.compile(optimizer, "mse", run_eagerly=case.get("eager", False))
    keras.config.set_dtype_policy("float32")
    record = Record()
    before = strategy.local_report()
    start = [w.copy() for w in model.get_weights()]
    model.fit(x, y, batch_size=BATCH_SIZE, shuffle=False, verbose=0, callbacks=[record])
    after = strategy.local_report()
    state = [v for v in optimizer.variables if "gradient_accumulator" not in v.path]
    result = {
        "seen": record.seen,
        "finite": all(bool(np.all(np.isfinite(w))) for w in model.get_weights()),
        "moved": max(
            float(np.max(np.abs(a - b))) for a, b in zip(start, model.get_weights(), strict=True)
        ),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(state),
    }
    for name in ("rounds", "contributed", "late", "replayed"):
        result[name] = getattr(after, name) - getattr(before, name)
    return result


def main() -> None:
    strategy = tf_syncdist.SyncReplicasStrategy(
        backup_workers=task.ARGUMENTS["backup_workers"],
        **task.patience(task.ARGUMENTS["backup_workers"]),
    )
    results = {}
    for number, (name, case) in enumerate(cases().items()):
        if task.ARGUMENTS.get("only") in (None, name):
            results[name] = train(strategy, number, case)
            task.meet(strategy, f"after_{name}")
    task.write(strategy.worker_index, results)


main()
