"""Workers get a signal in one state after another; those that are left train on.

Every part has one victim. What the victim waits for comes only when it is gone, so if it does not
end by itself the job fails. A process of its own sends the signal and measures how long it takes.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

STEPS = 4

# Job control may have made this process ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

arguments = task.ARGUMENTS
directory = pathlib.Path(arguments["directory"])
number = arguments["signal"]

SEND = """
import json, os, pathlib, sys, time
pid, number, path = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])

def state():
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"

def lives():
    return state() != "Z"

# Who waits sleeps; who has had no turn yet, and is not in its state, does not.
asleep, polls = 0, 0
while asleep < 50 and polls < int(sys.argv[4]):
    time.sleep(0.02)
    polls, asleep = polls + 1, asleep + 1 if state() == "S" else 0
started = time.monotonic()
os.kill(pid, number)

while lives() and time.monotonic() - started < 60:
    time.sleep(0.01)
new = path.with_suffix(".tmp")
new.write_text(json.dumps(time.monotonic() - started))
os.replace(new, path)
"""


def seconds_of(victim: int) -> pathlib.Path:
    return directory / f"signal-{victim}.json"


def signal_me(victim: int, computes: bool = False) -> None:
    """Has a signal sent to this process, which is the victim, when it has waited for a second.

    Args:
        victim: This worker.
        computes: Whether it does not wait, so that the signal is sent in a second.
    """
    path, polls = str(seconds_of(victim)), "50" if computes else "1000"
    subprocess.Popen(
        [sys.executable, "-S", "-c", SEND, str(os.getpid()), str(number), path, polls],
        start_new_session=True,
    )


def until_gone(victim: int, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not seconds_of(victim).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"worker {victim} has not ended within {seconds:g} s")
        time.sleep(0.02)


if arguments.get("connect"):
    # Nobody serves at the address.
    signal_me(1)
strategy = tf_syncdist.SyncReplicasStrategy(**task.PATIENCE)
if "wait_less" in arguments:
    task.wait_less(strategy, arguments["wait_less"])
worker = strategy.worker_index
BATCH_SIZE = 2 * strategy.num_workers
x = np.random.RandomState(0).randn(BATCH_SIZE * STEPS, 3).astype("float32")
y = x[:, :1]
keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
Lambda = keras.callbacks.LambdaCallback


def fit(*callbacks: keras.callbacks.Callback) -> None:
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=1, verbose=0, callbacks=list(callbacks))


def start(victim: int) -> None:
    """While it waits for the models of the others."""
    if worker == victim:
        signal_me(victim)
    else:
        until_gone(victim)
    fit()


def step(victim: int) -> None:
    """Inside of a step that waits for another worker."""

    def after_batch(batch: int, logs: dict | None = None) -> None:
        if batch == 1:
            if worker == victim:
                signal_me(victim)
            elif worker == (0 if victim else 1):
                until_gone(victim)

    fit(Lambda(on_train_batch_end=after_batch))


def evaluate(victim: int) -> None:
    """Inside of evaluate and predict, while the others wait for it."""
    if worker == victim:
        signal_me(victim, computes=True)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            model.evaluate(x, y, verbose=0)
            model.predict(x, verbose=0)
    fit()


def native(victim: int) -> None:
    """In a computation of which Python knows nothing."""
    if worker == victim:

        def begin() -> None:
            # Not before: tracing is Python's.
            signal_me(victim)
            time.sleep(90.0)

        @tf.function
        def computes() -> tf.Tensor:
            return task.after(tf.constant(0), begin)

        computes()
    fit()


def receive(victim: int) -> None:
    """While it waits for the variables of another worker."""

    def after_batch(batch: int, logs: dict | None = None) -> None:
        if worker == victim and batch == STEPS - 1:
            model.layers[0].kernel.assign(model.layers[0].kernel.value + 1.0)
            signal_me(victim)

    def after_epoch(epoch: int, logs: dict | None = None) -> None:
        if worker == 0:
            until_gone(victim)

    fit(Lambda(on_train_batch_end=after_batch, on_epoch_end=after_epoch))


def custom(victim: int) -> None:
    """Inside of a step of a custom loop."""

    def replica_step(xs: tf.Tensor, ys: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            error = tf.reduce_sum((model(xs, training=True) - ys) ** 2) / BATCH_SIZE
        gradients = tape.gradient(error, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    @tf.function
    def one(xs: tf.Tensor, ys: tf.Tensor) -> None:
        strategy.run(replica_step, args=(xs, ys))

    for count in range(STEPS):
        if count == 2:
            if worker == victim:
                signal_me(victim)
            elif worker == 0:
                until_gone(victim)
        one(x[:4], y[:4])


def stay(victim: int) -> None:
    """At the end of its program, where it stays for the others."""
    if worker == victim:
        signal_me(victim)
        sys.exit()
    until_gone(victim)


def main() -> None:
    parts: dict[str, Callable[[int], None]] = {
        f.__name__: f for f in (start, step, evaluate, native, receive, custom, stay)
    }
    for name, victim in arguments["parts"]:
        parts[name](victim)
    task.write(
        worker,
        {
            "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
            "rounds": strategy.local_report().rounds,
            "seconds": {
                name: json.loads(seconds_of(victim).read_text())
                for name, victim in arguments["parts"]
            },
        },
    )


main()
