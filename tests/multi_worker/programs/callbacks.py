"""Trains with Keras' callbacks and with some that want something else on one worker only."""

import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 16
STEPS = 12
EXAMPLES = BATCH_SIZE * STEPS

random = np.random.RandomState(2)
x = random.randn(EXAMPLES, 6).astype("float32")
y = (x[:, :2] * x[:, 2:4]).astype("float32")

strategy = tf_syncdist.SyncReplicasStrategy(
    backup_workers=task.ARGUMENTS["backup_workers"],
    **task.patience(task.ARGUMENTS["backup_workers"]),
)
worker = strategy.worker_index
last = worker == strategy.num_workers - 1
pause = task.ARGUMENTS.get("pause_seconds", 0.0) if last else 0.0
directory = pathlib.Path(task.ARGUMENTS["directory"])
results: dict[str, Any] = {}
Lambda = keras.callbacks.LambdaCallback


class Spoils(keras.layers.Layer):
    """Turns what it is given into NaN from some run on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.calls = 0
        self.after = after

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return inputs

        def spoil(values: np.ndarray) -> np.ndarray:
            self.calls += 1
            return values * np.float32(np.nan if self.calls > self.after else 1)

        found = tf.numpy_function(spoil, [inputs], tf.float32)
        found.set_shape(inputs.shape)
        # numpy_function has no gradient.
        return inputs + tf.stop_gradient(found - inputs)


def build(
    *extra: keras.layers.Layer,
    steps_per_execution: int = 1,
    rate: float = 0.05,
    slow: keras.layers.Layer | None = None,
) -> Any:
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="tanh"),
                slow or task.Pause(pause),
                *extra,
                keras.layers.Dense(2),
            ]
        )
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.9),
            "mse",
            steps_per_execution=steps_per_execution,
        )
    return model


def fit(model: keras.Model, *callbacks: Any, epochs: int = 4, **kwargs: Any) -> dict[str, Any]:
    """Trains and returns what has to be alike."""
    before = strategy.local_report().rounds
    history = model.fit(
        kwargs.pop("x", x),
        y,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **kwargs,
    ).history
    return {
        "runs": strategy.local_report().rounds - before,
        "epochs": len(history.get("loss", [])),
        "loss": [repr(v) for v in history.get("loss", [])],
        "rate": [repr(v) for v in history.get("learning_rate", [])],
        "stops": bool(model.stop_training),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
    }


def schedules() -> None:
    model = build()
    rate = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.05 / (1 + epoch))
    results["scheduler"] = fit(model, rate)
    # Nothing but an improvement by 100 counts.
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100.0)
    results["plateau"] = fit(model, plateau)
    results["plateau"]["at_the_end"] = float(model.optimizer.learning_rate.numpy())


def early() -> None:
    model = build()
    kept: list[str] = []
    note = Lambda(
        on_epoch_end=lambda epoch, logs: kept.append(
            tf_syncdist.variables_sha256(model.trainable_variables)
        )
    )
    stop = keras.callbacks.EarlyStopping(
        "val_loss", min_delta=100.0, patience=1, restore_best_weights=True
    )
    results["early"] = fit(model, note, stop, validation_data=(x, y))
    results["early"]["is_best"] = results["early"]["weights_sha256"] == kept[0]
    results["after_early"] = fit(model, epochs=2)


def not_a_number() -> None:
    # The inputs of one worker only; not those of a slow one, which nobody would ever use. From the
    # fifth run on all rounds are the other one's.
    def slow() -> keras.layers.Layer:
        return task.FallsBehind(pause, strategy, always=True)

    own = x.copy()
    if worker == (0 if task.ARGUMENTS["backup_workers"] else 1):
        own[BATCH_SIZE * 4 :] = np.nan
    model = build(slow=slow())
    results["nan_data"] = fit(model, keras.callbacks.TerminateOnNaN(), x=own)
    spoils = [Spoils(after=5)] if worker == 0 else [keras.layers.Identity()]
    model = build(*spoils, slow=slow())
    results["nan_layer"] = fit(model, keras.callbacks.TerminateOnNaN())
    model = build()
    results["after_nan"] = fit(model, keras.callbacks.TerminateOnNaN(), epochs=1)


def wishing(model: keras.Model, when: Callable[[], bool], at: str) -> keras.callbacks.Callback:
    def wish(*_: Any, **__: Any) -> None:
        if when():
            model.stop_training = True

    return Lambda(**{at: wish})


def wishes(steps_per_execution: int) -> None:
    """One worker, or all, want to stop."""
    for who in (0, strategy.num_workers - 1):
        for at, after in (("on_train_batch_end", 5), ("on_epoch_end", 0), ("on_epoch_begin", 1)):
            if f"{at} of {who}" not in task.ARGUMENTS["wishes"]:
                continue
            model = build(steps_per_execution=steps_per_execution)
            count = [0]

            def when(count: list[int] = count, after: int = after, who: int = who) -> bool:
                count[0] += 1
                return worker == who and count[0] > after

            name = f"{at} of {who} by {steps_per_execution}"
            results[name] = fit(model, wishing(model, when, at), epochs=30)
            results[f"after {name}"] = fit(model, epochs=2)
    for at in ("on_epoch_end", "on_train_batch_end"):
        if f"{at} of all" not in task.ARGUMENTS["wishes"]:
            continue
        model = build(steps_per_execution=steps_per_execution)
        name = f"{at} of all by {steps_per_execution}"
        results[name] = fit(model, wishing(model, lambda: True, at), epochs=30)
        results[f"after {name}"] = fit(model, epochs=2)


def weights_by_hand() -> None:
    model = build()

    def halve(epoch: int, logs: dict | None = None) -> None:
        model.layers[0].kernel.assign(model.layers[0].kernel.value * 0.5)
        model.set_weights([0.9 * w for w in model.get_weights()])

    results["by_hand"] = fit(model, Lambda(on_epoch_end=halve))


def files() -> None:
    """The chief writes, all or it alone read."""
    path = directory / "all.weights.h5"
    model = build()
    callbacks: list[Any] = []
    if strategy.is_chief:
        callbacks.append(
            keras.callbacks.ModelCheckpoint(str(path), save_weights_only=True, monitor="loss")
        )
        callbacks.append(keras.callbacks.CSVLogger(str(directory / "log.csv")))
    results["checkpoint"] = fit(model, *callbacks, epochs=2)
    task.meet(strategy, "checkpoint")

    other = build()
    other.load_weights(path)
    results["loaded_by_all"] = {
        "weights_sha256": tf_syncdist.variables_sha256(other.trainable_variables)
    }
    results["after_loaded_by_all"] = fit(other, epochs=1)

    # A model that has been trained, so that its variables are common already.
    fit(other, epochs=1)
    if strategy.is_chief:
        other.load_weights(path)
        results["started_from"] = tf_syncdist.variables_sha256(other.trainable_variables)
    begun: list[str] = []
    note = Lambda(
        on_epoch_begin=lambda epoch, logs: begun.append(
            tf_syncdist.variables_sha256(other.trainable_variables)
        ),
    )
    results["loaded_by_chief"] = fit(other, note, epochs=1)
    results["loaded_by_chief"]["began_with"] = begun[0]
    # A new model.
    new = build()
    if strategy.is_chief:
        new.load_weights(path)
    results["new_loaded_by_chief"] = fit(new, epochs=1)


def whole_models() -> None:
    """The chief saves while the others train on; all continue."""
    path = directory / "whole.keras"
    model = build()
    fit(model, epochs=1)

    def save(epoch: int, logs: dict | None = None) -> None:
        if strategy.is_chief and epoch == 1:
            model.save(path)
            results["saved"] = {
                "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
                "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
            }

    results["while_saving"] = fit(model, Lambda(on_epoch_end=save), epochs=3)
    task.meet(strategy, "saved")
    with strategy.scope():
        loaded = keras.models.load_model(path, custom_objects={"Pause": task.Pause})
    results["loaded"] = {
        "weights_sha256": tf_syncdist.variables_sha256(loaded.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(loaded.optimizer.variables),
    }
    results["continued"] = fit(loaded, epochs=1)
    results["continued"]["iterations"] = int(loaded.optimizer.iterations.numpy())


def main() -> None:
    parts: dict[str, Callable[[], None]] = {
        "schedules": schedules,
        "early": early,
        "not_a_number": not_a_number,
        "wishes_by_1": lambda: wishes(1),
        "wishes_by_3": lambda: wishes(3),
        "weights_by_hand": weights_by_hand,
        "files": files,
        "whole_models": whole_models,
    }
    for number, (name, part) in enumerate(parts.items()):
        if name in task.ARGUMENTS["parts"]:
            keras.utils.set_random_seed(number)
            part()
    task.write(worker, results)


main()
