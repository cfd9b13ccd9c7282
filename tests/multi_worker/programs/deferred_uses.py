"""Uses variables whose update waits for the next run, in every way that comes from outside.

The gradient of every step is the same, so what a weight is after so many steps is known.
"""

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist
from tf_syncdist.propagation import PriorityPropagation

FEATURES = 6
BATCH_SIZE = 8
STEPS = 8
RATE = 0.5

strategy = tf_syncdist.SyncReplicasStrategy(
    propagation=PriorityPropagation(slice_elements=4, credit_bytes=16), **task.patience()
)
worker = strategy.worker_index
controller = strategy._controller
directory = pathlib.Path(task.ARGUMENTS["directory"])
x = np.ones((BATCH_SIZE * STEPS, FEATURES), np.float32)
y = np.zeros((BATCH_SIZE * STEPS, 1), np.float32)
results: dict[str, Any] = {}
# What was seen, and whether an update was waiting before it was looked at.
seen: list[tuple[float, bool]] = []


def as_it_is(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """A loss whose gradient is that of what is predicted: one everywhere, for such an `x`."""
    return tf.reduce_mean(y_pred, -1)


def make(optimizer: Callable[[], Any] = lambda: keras.optimizers.SGD(RATE), **how: Any) -> Any:
    """Returns a model whose weights, zero at first, lose `RATE` in each step."""
    with strategy.scope():
        inputs = keras.Input((FEATURES,))
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        model = keras.Model(inputs, layer(inputs))
        model.compile(optimizer(), as_it_is, **how)
    return model


def look(value: Any) -> None:
    """Notes values that are to be equal, given by a function that looks at them."""
    waits = controller._deferral.pending is not None
    found = np.unique(np.asarray(value()))
    assert found.size == 1, found
    seen.append((float(found[0]), waits))


class AfterBatch(keras.callbacks.Callback):
    """Calls a function after every batch."""

    def __init__(self, function: Callable[[keras.Model, int], Any]) -> None:
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.function(self.model, batch)


def fit(model: keras.Model, function: Callable = lambda *_: None, **how: Any) -> Any:
    given = {"x": x, "y": y, "batch_size": BATCH_SIZE} | how
    return model.fit(shuffle=False, verbose=0, callbacks=[AfterBatch(function)], **given)


def own_step(model: keras.Model) -> Callable[[], Any]:
    """Returns a step of a loop of the user's own."""
    batch = tf.constant(x[:BATCH_SIZE])

    def replica_step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(batch, training=True)) / strategy.num_replicas_in_sync
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss

    return tf.function(lambda: strategy.run(replica_step))


def get_weights() -> None:
    fit(make(), lambda model, _: look(lambda: model.get_weights()[0]))


def slots() -> None:
    """What an optimizer holds, and how often it has updated."""
    counts = []

    def slot(model: keras.Model, _: int) -> None:
        counts.append(int(model.optimizer.iterations.numpy()))
        (momentum,) = [v for v in model.optimizer.variables if "momentum" in v.path]
        look(momentum.numpy)

    fit(make(lambda: keras.optimizers.SGD(RATE, momentum=1.0)), slot)
    results["counts"] = counts


def saved() -> None:
    """Every worker into a file of its own."""
    path = directory / f"model-{worker}.keras"

    def save() -> Any:
        model.save(path)
        return keras.models.load_model(path, compile=False).get_weights()[0]

    model = make()
    fit(model, lambda *_: look(save))


def checkpoint() -> None:
    prefix = str(directory / f"checkpoint-{worker}")

    def write() -> Any:
        path = tf.train.Checkpoint(model=model).write(prefix)
        (name,) = [n for n, s in tf.train.list_variables(path) if "kernel" in n or s == [6, 1]]
        return tf.train.load_checkpoint(path).get_tensor(name)

    model = make()
    fit(model, lambda *_: look(write))


def evaluated() -> None:
    model = make()
    history = fit(model, epochs=3, validation_data=(x, y))
    results["val_loss"] = history.history["val_loss"]
    look(lambda: model.evaluate(x, y, verbose=0) / FEATURES)


def eagerly() -> None:
    model = make()
    step = own_step(model)
    for _ in range(STEPS):
        step()
        look(lambda: model(x[:1]) / FEATURES)


def on_one_worker() -> None:
    """Only one worker looks; the others go on."""
    model = make()
    step = own_step(model)
    for _ in range(STEPS):
        step()
        if worker == 1:
            look(lambda: model.get_weights()[0])
    if worker == 0:
        look(lambda: model.get_weights()[0])


def without_exchange() -> None:
    """`strategy.run` of a function that only reads, in a graph and without one."""
    model = make()
    step = own_step(model)

    def read() -> tf.Tensor:
        return tf.identity(model.trainable_variables[0].value)

    in_graph = tf.function(lambda: strategy.run(read))
    for number in range(STEPS):
        step()
        look(in_graph if number % 2 else lambda: strategy.run(read))


def set_weights() -> None:
    """In steps 3 and 6 the weights are overwritten while their update waits."""
    path = directory / f"weights-{worker}.weights.h5"
    model = make()
    model.set_weights([np.full((FEATURES, 1), 100.0)])
    model.save_weights(path)
    model.set_weights([np.zeros((FEATURES, 1))])
    step = own_step(model)
    for number in range(STEPS):
        step()
        if number == 2:
            model.set_weights([np.full((FEATURES, 1), 50.0)])
        elif number == 5:
            model.load_weights(path)
    look(lambda: model.get_weights()[0])


def exception() -> None:
    def leave(_: keras.Model, batch: int) -> None:
        if batch == 4:
            raise KeyError("of the callback")

    model = make()
    try:
        fit(model, leave)
    except KeyError:
        look(lambda: model.get_weights()[0])
    fit(model)
    look(lambda: model.get_weights()[0])


def two_models() -> None:
    """In turn; neither update may be lost, or made in the other's step."""
    models = [make() for _ in range(2)]
    steps = [own_step(m) for m in models]
    for number in range(STEPS):
        steps[number % 2]()
    for model in models:
        look(lambda m=model: m.get_weights()[0])


def stopped() -> None:
    """One worker wishes to stop."""

    def stop(model: keras.Model, batch: int) -> None:
        if worker == 1 and batch == 2:
            model.stop_training = True

    model = make()
    before = controller.run
    fit(model, stop, epochs=10)
    runs = controller.run - before
    look(lambda: model.get_weights()[0] / runs * STEPS)
    results["stopped_after"] = runs


def early_stopping() -> None:
    """The loss falls by the same in every epoch, which is not enough."""
    model = make()
    early = keras.callbacks.EarlyStopping("val_loss", min_delta=1e3, patience=1)
    before = controller.run
    how = {"batch_size": BATCH_SIZE, "shuffle": False, "verbose": 0, "epochs": 9}
    model.fit(x, y, validation_data=(x, y), callbacks=[early], **how)
    runs = controller.run - before
    look(lambda: model.get_weights()[0] / runs * STEPS)
    results["early_stopping_after"] = runs


def unknown_length() -> None:
    """Where the input ends is found from what workers have finished."""
    data = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(BATCH_SIZE)
    model = make()
    waits = []
    note = AfterBatch(lambda *_: waits.append(controller._deferral.pending is not None))
    model.fit(data, epochs=2, verbose=0, callbacks=[note])
    results["unknown_waits"] = waits
    look(lambda: model.get_weights()[0] / 2)


def generator() -> None:
    model = make()
    batches = ((x[:BATCH_SIZE], y[:BATCH_SIZE]) for _ in range(STEPS))
    model.fit(batches, verbose=0)
    look(lambda: model.get_weights()[0])


def after_unknown_length() -> None:
    """A loop without input of its own is no part of the input that has ended."""
    time.sleep(0.3 * worker)
    step = own_step(make())
    for _ in range(2):
        step()
        waits = controller._deferral.pending is not None
        seen.append((-RATE, waits))


def in_function() -> None:
    """Nobody is told when a tf.function reads a variable, so updates wait no longer."""
    model = make()
    step = own_step(model)
    read = tf.function(lambda: tf.identity(model.trainable_variables[0].value))
    again = tf.function(lambda: model(tf.constant(x[:1])) / FEATURES)
    for number in range(STEPS):
        step()
        if number >= 2:
            look(read)
            look(again)


CASES = [
    get_weights,
    slots,
    saved,
    checkpoint,
    evaluated,
    eagerly,
    on_one_worker,
    without_exchange,
    set_weights,
    exception,
    two_models,
    stopped,
    early_stopping,
    unknown_length,
    generator,
    after_unknown_length,
    in_function,
]


def main() -> None:
    for case in CASES:
        print(f"begins: {case.__name__}", file=sys.stderr, flush=True)
        seen.clear()
        before = strategy.local_report()
        case()
        after = strategy.local_report()
        results[case.__name__] = list(seen)
        results["late"] = results.get("late", 0) + after.late - before.late
    task.meet(strategy, "end")
    task.write(worker, results)


main()
