"""One worker process of benchmarks.propagation.

It trains in phases, between which the bandwidth of its link is changed. A phase is a file in the
directory of the job, `phase_0.json` and so on, that tells what to do. When it is done, the worker
writes what it has measured into a file of its own.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_syncdist
from benchmarks import propagation_clock, propagation_compute, propagation_models
from tf_syncdist.propagation import FifoPropagation, PriorityPropagation, Propagation

_MODEL = flags.DEFINE_enum("model", "vgg19", list(propagation_models.MODELS), "Which model.")
_MODE = flags.DEFINE_enum(
    "mode", "fifo", ["no_overlap", "fifo", "sliced", "priority"], "How gradients travel."
)
_COMPUTE = flags.DEFINE_enum("compute", "synthetic", ["synthetic", "real"], "What a step does.")
_COMPUTE_SECONDS = flags.DEFINE_float("compute_seconds", 0.8, "Computing of a synthetic step.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Images of a real step.")
_SLICE_ELEMENTS = flags.DEFINE_integer("slice_elements", 50_000, "For sliced and priority.")
_CREDIT_BYTES = flags.DEFINE_integer("credit_bytes", 0, "For priority; 0 is its default.")
_HAS_BUCKET = flags.DEFINE_bool("has_bucket", False, "Whether the transport limits the link.")
_TIMELINE = flags.DEFINE_string("timeline", "", "File for the strategy's timeline, if given.")
_DIRECTORY = flags.DEFINE_string("directory", None, "Where phases are found.", required=True)
_GIVE_UP_AT = flags.DEFINE_float(
    "give_up_at", None, "time.time() when the process prints its stacks and exits.", required=True
)
_RESULT_FILE = flags.DEFINE_string("result_file", None, "Where the result goes.", required=True)

# A sleeping layer holds one thread of this pool, and an exchange that waits another one. By default
# there are as many as the machine has cores, so nothing else could run on two of them.
_INTER_OP_THREADS = 8
_POLL_SECONDS = 0.005
_LEARNING_RATE = 0.01


def _propagation() -> Propagation:
    """Returns how gradients travel."""
    if _MODE.value == "fifo":
        return FifoPropagation()
    if _MODE.value == "no_overlap":
        return FifoPropagation(overlap=False)
    if _MODE.value == "sliced":
        return FifoPropagation(slice_elements=_SLICE_ELEMENTS.value)
    credit = {"credit_bytes": _CREDIT_BYTES.value} if _CREDIT_BYTES.value else {}
    return PriorityPropagation(slice_elements=_SLICE_ELEMENTS.value, **credit)


def _make_strategy() -> tf_syncdist.SyncReplicasStrategy:
    return tf_syncdist.SyncReplicasStrategy(
        # The links are within this machine.
        insecure=True,
        transport="grpc",
        print_report=False,
        propagation=_propagation(),
        timeline=_TIMELINE.value,
    )


class _Trainer:
    """The model and the training step of this worker.

    Attributes:
        variables: What is trained.
        compute: Forward and backward pass of a real model, without an exchange.
        train: A step.
    """

    def __init__(
        self, strategy: tf_syncdist.SyncReplicasStrategy, clock: propagation_clock.Clock
    ) -> None:
        self._strategy = strategy
        table = propagation_models.MODELS[_MODEL.value]()
        keras.utils.set_random_seed(1)
        with strategy.scope():
            if _COMPUTE.value == "real":
                self._gradients = self._real(table)
            else:
                self._gradients = self._synthetic(table, clock)
            self._optimizer = keras.optimizers.SGD(_LEARNING_RATE)
            self._optimizer.build(self.variables)

        def step_fn() -> None:
            self._optimizer.apply_gradients(zip(self._gradients(), self.variables, strict=True))

        @tf.function(autograph=False)
        def train() -> None:
            strategy.run(step_fn)

        @tf.function(autograph=False)
        def compute() -> list[tf.Tensor]:
            # Something of each gradient is returned, as otherwise none would be computed.
            return [tf.reduce_sum(gradient) for gradient in self._gradients()]

        self.train, self.compute = train, compute

    def _synthetic(
        self, table: propagation_models.Model, clock: propagation_clock.Clock
    ) -> Callable[[], list[tf.Tensor]]:
        layers = propagation_compute.sleeping_layers(table, _COMPUTE_SECONDS.value, clock)
        self.variables = [v for layer in layers for v in layer.trainable_variables]
        start = 1.0 + self._strategy.worker_index

        def gradients() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                activation = tf.constant(start)
                for layer in layers:
                    activation = layer(activation)
                # Its gradient depends on it, so the backward pass begins when this one is over.
                loss = activation**2 / self._strategy.num_replicas_in_sync
            return tape.gradient(loss, self.variables)

        return gradients

    def _real(self, table: propagation_models.Model) -> Callable[[], list[tf.Tensor]]:
        model = propagation_compute.real_model(table)
        self.variables = model.trainable_variables
        generator = np.random.default_rng(self._strategy.worker_index)
        size, classes = propagation_models.PIXELS, model.output_shape[-1]
        shape = (_BATCH_SIZE.value, size, size, 3)
        images = tf.constant(generator.standard_normal(shape, np.float32))
        labels = tf.constant(generator.integers(classes, size=_BATCH_SIZE.value))
        loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def gradients() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                loss = loss_fn(labels, model(images, training=True))
                loss /= self._strategy.num_replicas_in_sync
            return tape.gradient(loss, self.variables)

        return gradients


def _read_phase(number: int) -> dict[str, Any]:
    """Waits for the next phase; the process's deadline is that of the wait."""
    path = pathlib.Path(_DIRECTORY.value) / f"phase_{number}.json"
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    return json.loads(path.read_text())


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a file that is complete as soon as it is there."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)


def _run_phases(
    strategy: tf_syncdist.SyncReplicasStrategy, trainer: _Trainer, clock: propagation_clock.Clock
) -> None:
    """Does what the phases say, until one says that it is over."""
    for number in itertools.count():
        phase = _read_phase(number)
        if phase["kind"] == "end":
            return
        if _HAS_BUCKET.value:
            strategy.limit_gbps = phase["gbps"]
        step = {"compute": trainer.compute, "train": trainer.train}[phase["kind"]]
        clock.spans.clear()
        ends, cpu_seconds = [time.monotonic()], time.process_time()
        for _ in range(phase["steps"]):
            step()
            ends.append(time.monotonic())
        result = {
            "step_seconds": [b - a for a, b in zip(ends, ends[1:], strict=False)],
            # From the begin of the first layer's forward pass to the end of its backward pass.
            "chain_seconds": [end - begin for begin, end in clock.spans],
            "cpu_seconds": time.process_time() - cpu_seconds,
        }
        worker = strategy.worker_index
        _write(pathlib.Path(_DIRECTORY.value) / f"phase_{number}.worker_{worker}.json", result)


def main(argv: Sequence[str]) -> None:
    """Trains and writes the result."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    # The smallest delay keeps a deadline that has passed already from being an invalid one.
    faulthandler.dump_traceback_later(max(0.1, _GIVE_UP_AT.value - time.time()), exit=True)
    tf.config.threading.set_inter_op_parallelism_threads(_INTER_OP_THREADS)
    # Two workers share the cores of the machine.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    strategy = _make_strategy()
    clock = propagation_clock.Clock()
    trainer = _Trainer(strategy, clock)
    _run_phases(strategy, trainer, clock)
    strategy.synchronize()
    result = {"variables_sha256": tf_syncdist.variables_sha256(trainer.variables)}
    _write(pathlib.Path(_RESULT_FILE.value), result)


if __name__ == "__main__":
    app.run(main)
