"""Trains many small models with one way of propagation, and notes which updates were deferred."""

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist
from tf_syncdist.propagation import FifoPropagation, PriorityPropagation

BATCH_SIZE = 24
STEPS = 12
EPOCHS = 2
WORDS = 7

priority = task.ARGUMENTS.get("priority")
propagation = PriorityPropagation(**priority) if priority else FifoPropagation()
given = task.ARGUMENTS.get("strategy", {})
strategy = tf_syncdist.SyncReplicasStrategy(
    propagation=propagation, **given, **task.patience(given.get("backup_workers", 0))
)
worker = strategy.worker_index
controller = strategy._controller
pause = task.ARGUMENTS.get("pause_seconds", 0.0) if worker == strategy.num_workers - 1 else 0.0

random = np.random.RandomState(3)
x = random.randn(BATCH_SIZE * STEPS, 6).astype("float32")
y = (x[:, :3] * x[:, 3:]).astype("float32")
words = random.randint(0, WORDS, (BATCH_SIZE * STEPS, 6))

Optimizer = keras.optimizers.Optimizer
# At the end of how many steps an update was waiting for the next one.
waiting: list[bool] = []


def note() -> None:
    waiting.append(controller._deferral.pending is not None)


class Note(keras.callbacks.Callback):
    """Looks, after every execution, whether an update waits; reads no variable."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        note()


class NewRate(keras.callbacks.Callback):
    """Changes the learning rate between a run and its update, as far as that is deferred."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.model.optimizer.learning_rate = 0.01 / (1 + batch % 3)


def sgd(**kwargs: Any) -> Optimizer:
    return keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)


def adam(**kwargs: Any) -> Optimizer:
    return keras.optimizers.Adam(0.01, **kwargs)


def dense(units: int = 8) -> keras.layers.Layer:
    return keras.layers.Dense(units, activation="tanh")


def classic() -> keras.Model:
    inputs = keras.Input((6,))
    hidden = task.FallsBehind(pause, strategy)(dense()(inputs))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dropout(0.1)(hidden)))


def normalised() -> keras.Model:
    layers = [
        dense(),
        task.FallsBehind(pause, strategy),
        keras.layers.BatchNormalization(momentum=0.8),
    ]
    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)])


def embedded() -> keras.Model:
    inputs = keras.Input((6,))
    hidden = keras.layers.Flatten()(keras.layers.Embedding(WORDS, 3)(inputs))
    return keras.Model(
        inputs, keras.layers.Dense(3)(task.FallsBehind(pause, strategy)(dense()(hidden)))
    )


class Unordered(keras.Model):
    """Its layers are made in another order than they are used; one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.twice, self.first = keras.layers.Dense(3), dense(), dense()
        names = ("last", 8), ("twice", 8), ("first", 6)
        for name, units in names:
            layer = getattr(self, name)
            layer.name = name
            # So their variables come in this order as well.
            layer.build((None, units))
        self.rest = task.FallsBehind(pause, strategy)
        self.built = True

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        hidden = self.rest(self.first(inputs), training=training)
        return self.last(self.twice(self.twice(hidden)))


class Adversaries(keras.Model):
    """One step trains two networks with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.one = keras.Sequential([keras.Input((6,)), dense(), keras.layers.Dense(3)])
        self.other = keras.Sequential([keras.Input((3,)), dense(), keras.layers.Dense(1)])
        self.rest = task.FallsBehind(pause, strategy)
        self.other_optimizer = sgd()
        self.built = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.one(inputs)

    def train_step(self, data: Any) -> dict[str, Any]:
        inputs, targets = data
        with tf.GradientTape(persistent=True) as tape:
            made = self.one(self.rest(inputs, training=True), training=True)
            judged = tf.reduce_mean(self.other(made, training=True))
            error = tf.reduce_mean((made - targets) ** 2)
            replicas = strategy.num_replicas_in_sync
            loss, opposite = (error + judged) / replicas, (error - judged) / replicas
        ones, others = self.one.trainable_variables, self.other.trainable_variables
        self.optimizer.apply(tape.gradient(loss, [v.value for v in ones]), ones)
        self.other_optimizer.apply(tape.gradient(opposite, [v.value for v in others]), others)
        return {"loss": loss}


def fitted(
    build: Callable[[], keras.Model],
    optimizer: Callable[[], Optimizer],
    *callbacks: Any,
    **how: Any,
) -> keras.Model:
    """Trains with `fit`; `how` is for `compile`."""
    with strategy.scope():
        model = build()
        model.compile(optimizer(), "mse", **how)
    given = words if build is embedded else x
    model.fit(
        given,
        y,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[Note(), *callbacks],
    )
    return model


def in_batches() -> keras.Model:
    with strategy.scope():
        model = classic()
        model.compile(adam(), "mse")
    for step in range(EPOCHS * STEPS):
        batch = slice(step % STEPS * BATCH_SIZE, (step % STEPS + 1) * BATCH_SIZE)
        model.train_on_batch(x[batch], y[batch])
        note()
    return model


def looped(in_graph: bool = False) -> keras.Model:
    """A loop of the user's own; `in_graph` is one that TensorFlow executes."""
    with strategy.scope():
        model, optimizer = classic(), adam()
        optimizer.build(model.trainable_variables)
        model.optimizer = optimizer
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE).repeat(EPOCHS)
    data = strategy.experimental_distribute_dataset(data)

    def replica_step(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            error = tf.reduce_mean((model(inputs, training=True) - targets) ** 2)
            loss = error / strategy.num_replicas_in_sync
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss

    @tf.function
    def step(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        return strategy.run(replica_step, args=(inputs, targets))

    @tf.function
    def steps(iterator: Any) -> None:
        for _ in tf.range(STEPS):
            strategy.run(replica_step, args=next(iterator))

    iterator = iter(data)
    for _ in range(EPOCHS if in_graph else EPOCHS * STEPS):
        if in_graph:
            steps(iterator)
        else:
            step(*next(iterator))
        note()
    return model


schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
CASES: dict[str, Callable[[], keras.Model]] = {
    "schedule_sgd": lambda: fitted(
        classic,
        lambda: keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, global_clipnorm=0.5),
    ),
    "rate_adam": lambda: fitted(embedded, adam, NewRate()),
    "adamw": lambda: fitted(Unordered, lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1)),
    "executions": lambda: fitted(normalised, adam, steps_per_execution=4),
    "loop": looped,
    "graph_loop": lambda: looped(in_graph=True),
    "batches": in_batches,
    "scaled": lambda: fitted(
        classic,
        lambda: keras.optimizers.LossScaleOptimizer(sgd(), 2.0**10, dynamic_growth_steps=5),
    ),
    "adversaries": lambda: fitted(Adversaries, adam),
    "accumulation": lambda: fitted(classic, lambda: adam(gradient_accumulation_steps=4)),
    "average": lambda: fitted(classic, lambda: adam(use_ema=True, ema_overwrite_frequency=3)),
    "eager": lambda: fitted(classic, sgd, run_eagerly=True),
}


def main() -> None:
    results = {}
    for number, (name, train) in enumerate(CASES.items()):
        if name not in task.ARGUMENTS.get("only", CASES):
            continue
        print(f"begins: {name}", file=sys.stderr, flush=True)
        keras.utils.set_random_seed(number)
        waiting.clear()
        controller._plans.clear()
        before = strategy.local_report()
        model = train()
        uses = [key[1] for key in controller._plans if key[1] is not None]
        # A run whose update waits is not counted yet.
        controller.settle()
        after = strategy.local_report()
        optimizers = [model.optimizer, *filter(None, [getattr(model, "other_optimizer", None)])]
        variables = [v for o in optimizers for v in o.variables]
        results[name] = {
            "first_uses": _by_path(model, uses[0]) if uses else {},
            "waited": sum(waiting),
            "looks": len(waiting),
            "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
            "others_sha256": tf_syncdist.variables_sha256(model.non_trainable_variables),
            "optimizer_sha256": tf_syncdist.variables_sha256(variables),
            "iterations": int(model.optimizer.iterations.numpy()),
            "moved": float(max(np.abs(np.asarray(v)).max() for v in model.trainable_variables)),
            "common": len(controller._store.specs()),
            "rounds": after.rounds - before.rounds,
            "contributed": after.contributed - before.contributed,
            "replayed": after.replayed - before.replayed,
        }
    task.meet(strategy, "end")
    task.write(worker, results)


def _by_path(model: keras.Model, uses: tuple[int, ...]) -> dict[str, int]:
    # Where there are two optimizers, the first one updates the first variables.
    variables = model.trainable_variables
    return {"/".join(v.path.split("/")[-2:]): use for v, use in zip(variables, uses, strict=False)}


main()
