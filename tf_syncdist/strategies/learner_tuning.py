"""Finds out how many learners a device is given, before a fit begins.

Several workers measure at the same time, each for itself, and then choose alike from the figures of
all. A worker that comes later is told these by the service, which keeps them for the whole job.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_syncdist.mixing import tuning
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies import adapter, devices, iterators, learner_inputs
from tf_syncdist.strategies.learner_runs import LearnerRuns
from tf_syncdist.strategies.learners import Learners
from tf_syncdist.strategies.lifetime import say
from tf_syncdist.transport.session import Session

# Each measurement is the median of so many, of so many seconds or more, each.
_WINDOWS, _WINDOW_SECONDS = 5, 0.04
# Much more than one has ever been worth while; each takes memory.
_MOST = 32


def tune(
    runs: LearnerRuns,
    learners: Learners,
    model: keras.Model,
    dataset: tf.data.Dataset,
    batch_size: int | None,
    session: Session | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Returns how many learners this worker should have, and says what was tried.

    It trains with a batch of the training input over and over, while learners are added; then all
    variables are what they were. No value of a model travels meanwhile.

    Args:
        runs: Its runs.
        learners: Its learners; they are left in the number that is returned.
        model: The model that is about to be trained.
        dataset: Its input, batched.
        batch_size: The size of its batches, if that is known.
        session: The connection to the service, if there are several workers.
        clock: Returns the time in seconds; monotonic.
    """
    tells = True
    try:
        if session is None:
            tuner = _tried(runs, learners, model, dataset, batch_size, clock)
        else:
            mine: list[float] = []
            is_late = session.wait_started().in_progress
            # Who comes late is told what the job has chosen.
            if not is_late:
                with runs.alone():
                    tried = _tried(runs, learners, model, dataset, batch_size, clock)
                mine = [trial.throughput for trial in tried.trials]
            tuner = tuning.agreed(_gathered(session, mine), most=_MOST)
            tells = not session.config.worker and not is_late
    finally:
        # What was traced here keeps the copies of learners that were tried, and with several
        # workers it would go on without the others.
        model.train_function = None
        learners.forget()
        learners.resize(learners.num_devices)
    learners.resize(tuner.learners * learners.num_devices)
    if tells and tuner.trials:
        say("learners per device\n" + tuning.table(tuner))
        if devices.cuts_operations():
            say(
                "TensorFlow cuts each operation over several cores, where learners get into each "
                f"other's way; try with {devices.INTRAOP_THREADS}=1 in the environment, too"
            )
    elif tells:
        say("learners_per_device='auto' is 1, since input of unknown length is not read twice")
    return learners.count


def _gathered(session: Session, mine: list[float]) -> list[list[float]]:
    """Returns what workers have measured, without those that have not."""
    rates = np.zeros((session.config.num_workers, _MOST))
    rates[session.config.worker, : len(mine)] = mine
    found = session.gather(pb.LEARNERS, 0, 0, values=rates.reshape(-1)).values
    return [[r for r in row if r] for row in found.reshape(rates.shape) if row.any()]


def _tried(
    runs: LearnerRuns,
    learners: Learners,
    model: keras.Model,
    dataset: tf.data.Dataset,
    batch_size: int | None,
    clock: Callable[[], float],
) -> tuning.Tuner:
    """Returns what this worker has tried; nothing if its input cannot be read twice."""
    batch = _first_batch(dataset, batch_size)
    if batch is None:
        return tuning.Tuner()
    adapter.build(model, batch)
    values = _Values(runs)
    values.note()
    model.train_function = None
    model.make_train_function()
    tuner, size = tuning.Tuner(), _examples(batch)
    try:
        runs.keep_traces(True)
        # What training makes is seen before it is trained where there are learners, that is, two.
        learners.resize(2 * learners.num_devices)
        runs.on_emitted = values.note
        with contextlib.suppress(tf.errors.ResourceExhaustedError):
            model.train_function(_same_again(batch, learners.count))
        runs.on_emitted = None
        while not tuner.done:
            learners.resize(tuner.learners * learners.num_devices)
            try:
                rate = _runs_per_second(model, batch, learners.count, clock)
            except tf.errors.ResourceExhaustedError:
                if not tuner.trials:
                    raise
                # There is no memory for one more.
                tuner = tuning.Tuner(tuner.learners - 1, True, tuner.trials)
                continue
            tuner = tuning.measured(tuner, rate * learners.count * size, most=_MOST)
    finally:
        runs.on_emitted = None
        runs.keep_traces(False)
        values.restore()
    return tuner


class _Values:
    """What variables hold before they are trained.

    Args:
        runs: The runs that may make some.
    """

    def __init__(self, runs: LearnerRuns) -> None:
        self._runs = runs
        self._known: dict[int, tuple[tf.Variable, list[np.ndarray]]] = {}

    def note(self) -> None:
        """Takes note of what is new."""
        for variable in self._runs.registry.alive():
            if id(variable) not in self._known:
                with contextlib.suppress(tf.errors.FailedPreconditionError):
                    values = [c.numpy() for c in adapter.components(variable)]
                    self._known[id(variable)] = (variable, values)

    def restore(self) -> None:
        """Lets variables hold that again."""
        for variable, values in self._known.values():
            for copy, value in zip(adapter.components(variable), values, strict=False):
                copy.assign(value)
        self._runs.forget_count()


def _examples(batch: Any) -> int:
    shape = tf.nest.flatten(batch)[0].shape
    return int(shape[0]) if shape.rank else 1


def _first_batch(dataset: tf.data.Dataset, batch_size: int | None) -> Any:
    # What Keras makes of arrays does not tell its length either, but costs nothing to read.
    if batch_size is None and int(dataset.cardinality()) == tf.data.UNKNOWN_CARDINALITY:
        return None
    for batch in dataset.take(1):
        return batch
    return None


def _same_again(batch: Any, learners: int) -> iterators.WorkerIterator:
    """Returns an iterator that gives one batch to all learners, over and over, read as in a fit."""
    spec = tf.nest.map_structure(tf.type_spec_from_value, batch)
    first = tf.nest.flatten(spec)[0]
    size = first.shape[0] if isinstance(first, tf.TensorSpec) and first.shape.rank else None
    if learners == 1 or size is None or not learner_inputs.stacks(spec, size):
        same = tf.data.Dataset.from_tensors(batch).repeat().prefetch(2 * learners)
        return iterators.WorkerIterator(iter(same), None, learners)
    whole = tf.nest.map_structure(lambda t: tf.concat([t] * learners, 0), batch)
    same = tf.data.Dataset.from_tensors(whole).repeat().prefetch(2)
    return iterators.WorkerIterator(iter(same), None, learners, size)


def _runs_per_second(
    model: keras.Model, batch: Any, learners: int, clock: Callable[[], float]
) -> float:
    iterator = _same_again(batch, learners)
    steps = model.steps_per_execution
    for _ in range(2):
        model.train_function(iterator)
    rates = []
    for _ in range(_WINDOWS):
        begin, count = clock(), 0
        while (seconds := clock() - begin) < _WINDOW_SECONDS:
            model.train_function(iterator)
            count += steps
        rates.append(count / seconds)
    return float(np.median(rates))
