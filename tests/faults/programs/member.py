"""What every worker program of these tests does: read arguments, say where it is, write results."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import tf_syncdist
from tf_syncdist.propagation import PriorityPropagation

ARGUMENTS: dict[str, Any] = json.loads(sys.argv[1])
_LIFE = os.environ["TF_SYNCDIST_TEST_LIFE"]
_CALM = Path(_LIFE).parent / "calm"
_CALM_SECONDS = 0.002
_OVER = Path(_LIFE).parent / "over"
_LINGER_SECONDS = 2.0

# The machine may be busy with other tests.
PATIENCE = {
    "connect_timeout_seconds": 60.0,
    "timeout_seconds": 90.0,
    "bucket_bytes": 300,
    "min_workers": ARGUMENTS.get("min_workers", 1),
}
if "priority" in ARGUMENTS:
    PATIENCE["propagation"] = PriorityPropagation(**ARGUMENTS["priority"])
# Who looks at variables makes an update that waits.
_NOTE_EVERY = ARGUMENTS.get("note_every", 1)
# A job is not over before its faults have happened, however slowly they are made to happen.
_LAST = ARGUMENTS.get("rounds", ARGUMENTS.get("steps", 0) * ARGUMENTS.get("epochs", 1)) - 10


class Trace:
    """A file with a line after each run: how many rounds there were, and what the variables are.

    Args:
        optimizer: Counts the rounds.
        variables: The variables.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, variables: list) -> None:
        self._file = open(f"{_LIFE}.trace", "a", buffering=1)
        self._optimizer = optimizer
        self._variables = variables
        self._file.write("0 joined\n")

    def note(self) -> None:
        """Adds a line, perhaps not after every run."""
        rounds = int(self._optimizer.iterations.numpy())
        linger(rounds)
        if rounds % _NOTE_EVERY:
            return
        sha256 = tf_syncdist.variables_sha256([*self._variables, *self._optimizer.variables])
        self._file.write(f"{rounds} {sha256}\n")


class Callback(keras.callbacks.Callback):
    """Notes every run."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._trace.note()


class Pause(keras.layers.Layer):
    """Takes its time in training, so that the cores of the machine do not decide.

    That ends when all faults have happened and everybody is there again (see `jobs.py`).
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not self.seconds:
            return inputs

        def pause() -> int:
            time.sleep(_CALM_SECONDS if _CALM.exists() else self.seconds)
            return 0

        with tf.control_dependencies([tf.numpy_function(pause, [], tf.int64)]):
            return tf.identity(inputs)


def model_and_optimizer(strategy: tf_syncdist.SyncReplicasStrategy) -> tuple:
    """Returns a small model and its optimizer; each worker begins with other values."""
    keras.utils.set_random_seed(ARGUMENTS.get("seed", 0) + strategy.worker_index)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((16,)),
                Pause(ARGUMENTS.get("step_seconds", 0.05)),
                keras.layers.Dense(24, activation="relu"),
                keras.layers.Dense(8),
                keras.layers.Dense(4),
            ]
        )
        optimizer = keras.optimizers.Adam(3e-3)
        optimizer.build(model.trainable_variables)
    return model, optimizer


def wait_for(life: str, runs: int) -> None:
    """Waits until another worker has done so many runs."""
    trace = Path(_LIFE).parent / f"{life}.trace"
    deadline = time.monotonic() + 120
    while not trace.exists() or trace.read_text().count("\n") < runs:
        assert time.monotonic() < deadline, f"{life} has not done {runs} runs"
        time.sleep(0.01)


def hold(name: str) -> None:
    """Waits until a file is there, and where it is a trace has a line, or for being killed."""
    deadline = time.monotonic() + 100
    path = Path(_LIFE).parent / name
    while not path.exists() or (path.suffix == ".trace" and not path.read_text()):
        assert time.monotonic() < deadline, f"{name} is not there"
        time.sleep(0.01)


def linger(rounds: int) -> None:
    """Takes its time for each of the last rounds, as long as faults are to come.

    Not any time: who comes again may need this worker's state, which it gives between two runs.
    """
    deadline = time.monotonic() + _LINGER_SECONDS
    while rounds >= _LAST and not _OVER.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def write(strategy: Any, model: keras.Model, optimizer: Any, **more: Any) -> None:
    """Writes this worker's results, all at once."""
    results = {
        "rounds": int(optimizer.iterations.numpy()),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(optimizer.variables),
        "local": strategy.local_report()._asdict(),
        **more,
    }
    unfinished = Path(f"{_LIFE}.tmp")
    unfinished.write_text(json.dumps(results))
    os.replace(unfinished, f"{_LIFE}.json")
