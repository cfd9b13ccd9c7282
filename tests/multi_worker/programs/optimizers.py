"""Trains a small model with every optimizer and every option of optimizers, one after the other."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 24
STEPS = 12

random = np.random.RandomState(3)
x = random.randn(BATCH_SIZE * STEPS, 6).astype("float32")
y = (x[:, :3] * x[:, 3:]).astype("float32")

_OPTIMIZERS = keras.optimizers


class Capped(keras.constraints.Constraint):
    """Keeps weights small."""

    def __call__(self, w: tf.Tensor) -> tf.Tensor:
        return keras.ops.clip(w, -0.3, 0.3)


def build(policy: str, pause: float, constrained: bool) -> keras.Model:
    constraint = Capped() if constrained else None
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh", dtype=policy, kernel_constraint=constraint)(
        inputs
    )
    hidden = task.Pause(pause, dtype=policy)(hidden)
    hidden = keras.layers.Dense(4, activation="tanh", dtype=policy)(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(hidden))


def every_optimizer() -> dict[str, Callable[[], keras.optimizers.Optimizer]]:
    """Returns one of each class that Keras exports."""
    found = {}
    for name in dir(_OPTIMIZERS):
        candidate = getattr(_OPTIMIZERS, name)
        if not isinstance(candidate, type) or not issubclass(candidate, _OPTIMIZERS.Optimizer):
            continue
        if name in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer"):
            continue
        found[name.lower()] = functools.partial(candidate, 0.01)
    found["lossscale"] = lambda: _OPTIMIZERS.LossScaleOptimizer(_OPTIMIZERS.SGD(0.1))
    return found


def cases() -> dict[str, dict[str, Any]]:
    """Returns what to train with, by name."""
    found: dict[str, dict[str, Any]] = {
        name: {"optimizer": make} for name, make in every_optimizer().items()
    }
    sgd = functools.partial(_OPTIMIZERS.SGD, 0.1, momentum=0.9)
    adam = functools.partial(_OPTIMIZERS.Adam, 0.01)
    found |= {
        "accumulation": {"optimizer": lambda: sgd(gradient_accumulation_steps=4)},
        "accumulation_adam": {"optimizer": lambda: adam(gradient_accumulation_steps=4)},
        "ema": {"optimizer": lambda: adam(use_ema=True, ema_overwrite_frequency=3)},
        "ema_until_the_end": {"optimizer": lambda: sgd(use_ema=True, ema_momentum=0.5)},
        "clipnorm": {"optimizer": lambda: sgd(clipnorm=0.01)},
        "global_clipnorm": {"optimizer": lambda: sgd(global_clipnorm=0.02)},
        "clipvalue": {"optimizer": lambda: sgd(clipvalue=0.001)},
        "weight_decay": {"optimizer": lambda: sgd(weight_decay=0.05)},
        "constraint": {"optimizer": adam, "constrained": True},
        "schedule": {
            "optimizer": lambda: _OPTIMIZERS.SGD(
                _OPTIMIZERS.schedules.ExponentialDecay(0.1, 4, 0.5), momentum=0.9
            )
        },
        "float16": {"optimizer": sgd, "policy": "mixed_float16"},
        "float16_adam": {"optimizer": adam, "policy": "mixed_float16"},
        "bfloat16": {"optimizer": adam, "policy": "mixed_bfloat16"},
        "eager": {"optimizer": adam, "eager": True},
        "eager_accumulation": {
            "optimizer": lambda: sgd(gradient_accumulation_steps=4),
            "eager": True,
        },
        "eager_float16": {"optimizer": sgd, "policy": "mixed_float16", "eager": True},
    }
    return found


def main() -> None:
    plain = task.ARGUMENTS["plain"]
    backup = task.ARGUMENTS.get("backup_workers", 0)
    strategy = None
    if not plain:
        strategy = tf_syncdist.SyncReplicasStrategy(backup_workers=backup, **task.PATIENCE)
    worker = 0 if plain else strategy.worker_index
    pause = task.ARGUMENTS.get("pause_seconds", 0.0) if worker == 2 else 0.0
    results = {}
    for number, (name, case) in enumerate(cases().items()):
        if task.ARGUMENTS.get("only") not in (None, name):
            continue
        keras.utils.set_random_seed(number)
        policy = case.get("policy", "float32")
        with contextlib.nullcontext() if plain else strategy.scope():
            model = build(policy, pause, case.get("constrained", False))
            optimizer = case["optimizer"]()
            if policy == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer, dynamic_growth_steps=5)
            model.compile(optimizer, "mse", run_eagerly=case.get("eager", False))
        before = strategy.local_report() if strategy else None
        history = model.fit(x, y, batch_size=BATCH_SIZE, epochs=1, shuffle=False, verbose=0)
        optimizer_state = [
            v for v in model.optimizer.variables if "gradient_accumulator" not in v.path
        ]
        results[name] = {
            "loss": history.history["loss"][-1],
            "weights": [w.tolist() for w in model.get_weights()] if worker == 0 else None,
            "finite": all(math.isfinite(float(np.sum(w))) for w in model.get_weights()),
            "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
            "optimizer_sha256": tf_syncdist.variables_sha256(optimizer_state),
        }
        if strategy:
            after = strategy.local_report()
            results[name]["replayed"] = after.replayed - before.replayed
            results[name]["rounds"] = after.rounds - before.rounds
    task.write(worker, results)


main()
