"""Trains a small model with every optimizer and every option of optimizers, one after the other."""

import contextlib
import functools
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 24
STEPS = 12
WORKERS = 2
WORDS = 7

random = np.random.RandomState(3)
x = random.randn(BATCH_SIZE * STEPS, 6).astype("float32")
y = (x[:, :3] * x[:, 3:]).astype("float32")
# Few different words, so that every batch has each of them several times, on every worker.
words = random.randint(0, WORDS, (BATCH_SIZE * STEPS, 6))

_OPTIMIZERS = keras.optimizers
# They wrap other optimizers or none.
_NO_OPTIMIZERS_OF_THEIR_OWN = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
# Keras 3.10 cannot train with it in one process either: it asks TensorFlow's variables for a path.
_BROKEN = ("Muon",) if keras.__version__.startswith("3.10.") else ()
_CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")
_BITES = {"clipnorm": 0.02, "global_clipnorm": 0.05, "clipvalue": 0.005}


class Capped(keras.constraints.Constraint):
    """Keeps weights small."""

    def __call__(self, w: tf.Tensor) -> tf.Tensor:
        return keras.ops.clip(w, -0.3, 0.3)


def build(case: dict[str, Any], strategy: Any, pause: float) -> keras.Model:
    constraint = Capped() if case.get("constrained") else None
    inputs = keras.Input((6,))
    hidden = inputs
    if case.get("words"):
        hidden = keras.layers.Flatten()(keras.layers.Embedding(WORDS, 3)(inputs))
    hidden = keras.layers.Dense(8, activation="tanh", kernel_constraint=constraint)(hidden)
    hidden = task.FallsBehind(pause, strategy)(hidden)
    hidden = keras.layers.Dense(4, activation="tanh")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(hidden))


def every_optimizer() -> dict[str, dict[str, Any]]:
    """Returns one of each class that Keras exports."""
    found = {}
    for name in dir(_OPTIMIZERS):
        candidate = getattr(_OPTIMIZERS, name)
        if not isinstance(candidate, type) or not issubclass(candidate, _OPTIMIZERS.Optimizer):
            continue
        if name not in (*_NO_OPTIMIZERS_OF_THEIR_OWN, *_BROKEN):
            found[f"class_{name}"] = {"optimizer": functools.partial(candidate, 0.01)}
    return found


def options() -> dict[str, dict[str, Any]]:
    """Returns what to train with, by name."""
    sgd = functools.partial(_OPTIMIZERS.SGD, 0.1, momentum=0.9)
    adam = functools.partial(_OPTIMIZERS.Adam, 0.01)
    schedule = _OPTIMIZERS.schedules.ExponentialDecay(0.1, 4, 0.5)
    scaled = {"initial_scale": 2.0**10, "dynamic_growth_steps": 5}
    accumulates = {"gradient_accumulation_steps": 4}
    found: dict[str, dict[str, Any]] = {
        "accumulation_sgd": {"optimizer": lambda: sgd(**accumulates)},
        "accumulation_adam": {"optimizer": lambda: adam(**accumulates)},
        "accumulation_scaled_sgd": {
            "optimizer": lambda: _OPTIMIZERS.LossScaleOptimizer(sgd(**accumulates), **scaled)
        },
        "ema_adam": {"optimizer": lambda: adam(use_ema=True, ema_overwrite_frequency=3)},
        "ema_until_the_end_sgd": {"optimizer": lambda: sgd(use_ema=True, ema_momentum=0.5)},
        "weight_decay_sgd": {"optimizer": lambda: sgd(weight_decay=0.05)},
        "constraint_adam": {"optimizer": adam, "constrained": True},
        "schedule_sgd": {"optimizer": lambda: _OPTIMIZERS.SGD(schedule, momentum=0.9)},
        "scaled_sgd": {"optimizer": lambda: _OPTIMIZERS.LossScaleOptimizer(sgd(), **scaled)},
        "float16_sgd": {
            "optimizer": lambda: _OPTIMIZERS.LossScaleOptimizer(sgd(), **scaled),
            "policy": "mixed_float16",
        },
        # Keras wraps it itself.
        "float16_adam": {"optimizer": adam, "policy": "mixed_float16"},
        "bfloat16_sgd": {"optimizer": sgd, "policy": "mixed_bfloat16"},
        "bfloat16_adam": {"optimizer": adam, "policy": "mixed_bfloat16"},
        "eager_adam": {"optimizer": adam, "eager": True},
        "eager_accumulation_sgd": {"optimizer": lambda: sgd(**accumulates), "eager": True},
        "eager_float16_sgd": {
            "optimizer": lambda: _OPTIMIZERS.LossScaleOptimizer(sgd(), **scaled),
            "policy": "mixed_float16",
            "eager": True,
        },
        "embedding_sgd": {"optimizer": sgd, "words": True},
        "embedding_adam": {"optimizer": adam, "words": True, "dense": True},
        "embedding_eager_adam": {
            "optimizer": adam,
            "words": True,
            "dense": True,
            "eager": True,
        },
        "embedding_accumulation_sgd": {"optimizer": lambda: sgd(**accumulates), "words": True},
    }
    for clip in _CLIPS:
        found[f"{clip}_idle_sgd"] = {"optimizer": functools.partial(sgd, **{clip: 1e3})}
        found[f"{clip}_bites_sgd"] = {
            "optimizer": functools.partial(sgd, **{clip: _BITES[clip]}),
            "clips": (clip, _BITES[clip]),
        }
    return found


def make_dense(optimizer: keras.optimizers.Optimizer) -> None:
    """Adds up the gradients of a word that is there several times, as an exchange does.

    Keras' Adam adds up the squares of them instead, unlike for a gradient that is dense.
    """
    apply = optimizer.apply

    def apply_dense(grads: list, trainable_variables: list | None = None) -> None:
        apply([tf.convert_to_tensor(g) for g in grads], trainable_variables)

    optimizer.apply = apply_dense


def clipped_by_hand(case: dict[str, Any], model: keras.Model) -> None:
    """Trains as workers do: each one clips the gradients of its own piece of a batch."""
    kind, limit = case["clips"]
    optimizer = _OPTIMIZERS.SGD(0.1, momentum=0.9)
    weights = model.trainable_variables
    for step in range(STEPS):
        batch = slice(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        total = [0.0] * len(weights)
        pieces = zip(np.split(x[batch], WORKERS), np.split(y[batch], WORKERS), strict=True)
        for piece_x, piece_y in pieces:
            with tf.GradientTape() as tape:
                error = tf.reduce_mean(tf.square(model(piece_x, training=True) - piece_y))
                loss = error / WORKERS
            gradients = tape.gradient(loss, [w.value for w in weights])
            if kind == "global_clipnorm":
                gradients, _ = tf.clip_by_global_norm(gradients, limit)
            elif kind == "clipnorm":
                gradients = [tf.clip_by_norm(g, limit) for g in gradients]
            else:
                gradients = [tf.clip_by_value(g, -limit, limit) for g in gradients]
            total = [t + g for t, g in zip(total, gradients, strict=True)]
        optimizer.apply(total, weights)


def train(
    number: int, case: dict[str, Any], strategy: Any, pause: float, by_hand: bool
) -> dict[str, Any]:
    keras.utils.set_random_seed(number)
    with strategy.scope() if strategy else contextlib.nullcontext():
        keras.config.set_dtype_policy(case.get("policy", "float32"))
        model = build(case, strategy, pause)
        keras.config.set_dtype_policy("float32")
        model.compile(case["optimizer"](), "mse", run_eagerly=case.get("eager", False))
    if not strategy:
        # Where Keras 3.15 does it itself, outside of a strategy, what an optimizer starts with is
        # lost, such as that of ScheduleFreeAdamW.
        model.optimizer.build(model.trainable_variables)
        if case.get("dense"):
            make_dense(model.optimizer)
    given = (words if case.get("words") else x, y)
    before = strategy.local_report() if strategy else None
    if by_hand:
        clipped_by_hand(case, model)
        return {"weights": [w.tolist() for w in model.get_weights()]}
    model.fit(*given, batch_size=BATCH_SIZE, epochs=1, shuffle=False, verbose=0)
    state = model.optimizer.variables
    common = [v for v in state if "gradient_accumulator" not in v.path]
    result = {
        "weights": [w.tolist() for w in model.get_weights()],
        "finite": all(bool(np.all(np.isfinite(w))) for w in model.get_weights()),
        "iterations": int(model.optimizer.iterations.numpy()),
        "scaled": isinstance(model.optimizer, _OPTIMIZERS.LossScaleOptimizer),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(common),
    }
    if strategy:
        after = strategy.local_report()
        for name in ("rounds", "contributed", "late", "replayed"):
            result[name] = getattr(after, name) - getattr(before, name)
    return result


def main() -> None:
    arguments = task.ARGUMENTS
    strategy = None
    if not arguments["plain"]:
        strategy = tf_syncdist.SyncReplicasStrategy(
            backup_workers=arguments["backup_workers"],
            **task.patience(arguments["backup_workers"]),
        )
    worker = strategy.worker_index if strategy else 0
    pause = arguments.get("pause_seconds", 0.0) if worker == 1 else 0.0
    cases = every_optimizer() if arguments["cases"] == "classes" else options()
    results = {}
    for number, (name, case) in enumerate(cases.items()):
        by_hand = arguments["plain"] and "clips" in case
        results[name] = train(number, case, strategy, pause, by_hand)
        # A slow worker's first run of a model is a part of the test, not its start.
        if strategy:
            task.meet(strategy, f"after_{name}")
    task.write(worker, results)


main()
