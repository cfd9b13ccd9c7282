"""Changes variables of one worker by hand, which is found where an epoch ends."""

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 8
STEPS = 8
CHANGE = 3.0

random = np.random.RandomState(4)
x = random.randn(BATCH_SIZE * STEPS, 5).astype("float32")
y = x[:, :2] * x[:, 2:4]

strategy = tf_syncdist.SyncReplicasStrategy(
    backup_workers=task.ARGUMENTS["backup_workers"],
    **task.patience(task.ARGUMENTS["backup_workers"]),
)
worker = strategy.worker_index
pause = task.ARGUMENTS.get("pause_seconds", 0.0) if worker == 1 else 0.0


def build() -> keras.Model:
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(6, activation="tanh", name="first"),
                task.Pause(pause),
                keras.layers.Dense(2, name="second"),
            ],
            name="model",
        )
        # So small a rate that what is changed by hand stays visible.
        model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "mse")
    return model


def kernel(model: keras.Model) -> Any:
    return model.get_layer("first").kernel


def slot(model: keras.Model) -> Any:
    (found,) = [v for v in model.optimizer.variables if "first_kernel_momentum" in v.path]
    return found


def change(variable: Any) -> None:
    variable.assign(variable.value + CHANGE)


class ByHand(keras.callbacks.Callback):
    """Changes a variable during the first epoch, and notes the state in the second."""

    def __init__(self, who: int, which: Callable[[keras.Model], Any]) -> None:
        super().__init__()
        # In a further run a slot would change the kernel.
        self.batch = STEPS - 1 if which is slot else STEPS // 2
        self.who = who
        self.which = which
        self.epoch = 0
        self.second = ""

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch
        if epoch == 1:
            self.second = state(self.model)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (worker, self.epoch, batch) == (self.who, 0, self.batch):
            change(self.which(self.model))


def state(model: keras.Model) -> str:
    return tf_syncdist.variables_sha256([*model.trainable_variables, *model.optimizer.variables])


def ended(model: keras.Model) -> dict[str, Any]:
    return {
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(model.optimizer.variables),
        "largest": float(np.max(kernel(model).numpy())),
    }


def in_fit(who: int, which: Callable[[keras.Model], Any], epochs: int = 2) -> dict[str, Any]:
    model = build()
    by_hand = ByHand(who, which)
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[by_hand])
    return {"second": by_hand.second, **ended(model)}


def in_loop(who: int) -> dict[str, Any]:
    model = build()
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)

    def replica_step(inputs: tf.Tensor, expected: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            errors = (model(inputs, training=True) - expected) ** 2
            loss = tf.reduce_mean(errors) / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def step(inputs: tf.Tensor, expected: tf.Tensor) -> tf.Tensor:
        return strategy.run(replica_step, args=(inputs, expected))

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)
    second = ""
    for epoch in range(2):
        for number, batch in enumerate(strategy.experimental_distribute_dataset(data)):
            step(*batch)
            if (worker, epoch, number) == (who, 0, STEPS // 2):
                change(kernel(model))
        strategy.synchronize()
        second = second or state(model)
    return {"second": second, **ended(model)}


def main() -> None:
    cases = {
        "kernel_of_1": lambda: in_fit(1, kernel),
        "kernel_of_0": lambda: in_fit(0, kernel),
        "slot_of_1": lambda: in_fit(1, slot),
        "slot_of_0": lambda: in_fit(0, slot),
        "last_epoch": lambda: in_fit(1, kernel, epochs=1),
        "loop_of_1": lambda: in_loop(1),
        "loop_of_0": lambda: in_loop(0),
        "nobody": lambda: in_fit(-1, kernel),
    }
    results = {}
    for number, (name, case) in enumerate(cases.items()):
        keras.utils.set_random_seed(number)
        print(f"case {name}", file=sys.stderr, flush=True)
        results[name] = case()
    task.write(worker, results)


main()
