"""The learners of a worker: copies of the variables that training writes, one set for each.

A training function is traced once, with the variables as the program has made them. It is then
called for every learner, with that learner's variables in the place of the ones that were traced:
so learners cost no trace each, and what is outside of training knows nothing of them.

What the program has made is the *central model*, which evaluate, predict, save and everything else
outside of training sees. Each learner has its own copy of what is trained and of other state that
training writes, such as the statistics of batch normalisation. Of what optimizers hold and of the
states of random generators, the first learner's copy is the program's own variable.
"""

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter, traces
from tf_syncdist.strategies import variables as vars_lib
from tf_syncdist.strategies.replays import Updates
from tf_syncdist.strategies.seeds import other_state
from tf_syncdist.strategies.untraced import untraced


class LearnerStep(NamedTuple):
    """A training function as it was traced for one learner.

    Args:
        function: The concrete function; it takes the tensors among its arguments.
        updates: Optimizers with the variables that each of them updates.
        trained: Distributed variables that are trained.
        statistics: Others that are averaged over learners for the central model.
        own: What every learner has for itself besides.
        metrics: Metrics' variables, which add up over learners.
    """

    function: Any
    updates: Updates
    trained: list[tf.Variable]
    statistics: list[tf.Variable]
    own: list[tf.Variable]
    metrics: list[tf.Variable]


def sorted_out(function: Any, updates: Updates, registry: vars_lib.VariableRegistry) -> LearnerStep:
    """Returns a traced training function with what it writes, by what becomes of it."""
    counts = traces.count_writes(function)
    written = registry.containers([v for v in function.graph.variables if counts[id(v)]])
    trained_ids = {id(v) for _, variables in updates for v in variables}
    owned_ids = {id(v.value) for optimizer, _ in updates for v in optimizer.variables}
    # Averages of models over time become the model at the end of a fit.
    owned_ids -= {id(v.value) for optimizer, _ in updates for v in adapter.averages_of(optimizer)}
    step = LearnerStep(function, updates, [], [], [], [])
    for variable in written:
        if adapter.is_sync_on_read(variable):
            step.metrics.append(variable)
        elif id(variable) in trained_ids:
            step.trained.append(variable)
        elif (
            variable.dtype.is_floating
            and id(variable) not in owned_ids
            and not vars_lib.is_accumulator(variable)
            and not vars_lib.is_random_state(variable)
            and not vars_lib.is_loss_scale(variable)
        ):
            step.statistics.append(variable)
        else:
            step.own.append(variable)
    return step


class Learners:
    """Holds the copies.

    Args:
        count: How many learners this worker has.
        worker: Index of this worker.
        num_workers: How many workers there are.
        devices: Devices of this worker; learners are dealt out to them in turn.
    """

    def __init__(
        self,
        count: int,
        worker: int,
        num_workers: int,
        devices: Sequence[str],
    ) -> None:
        self.count = count
        self._worker = worker
        self._num_workers = num_workers
        self._devices = devices
        # By the identity of a distributed variable: itself, and every learner's copy.
        self._copies: dict[int, tuple[weakref.ref, list[tf.Variable]]] = {}
        self._metrics: dict[int, weakref.ref] = {}

    def resize(self, count: int) -> None:
        """Changes how many there are. Those that stay keep their copies, and functions theirs."""
        self.count = count
        for _, copies in self._copies.values():
            del copies[count:]
        for variable in filter(None, (ref() for ref in self._metrics.values())):
            adapter.keep_components(variable, max(count, 1))

    def forget(self) -> None:
        """Gives all copies up; they are made anew where a function is traced anew."""
        self._copies.clear()

    @property
    def num_devices(self) -> int:
        """How many devices this worker has."""
        return len(self._devices)

    @property
    def has_devices(self) -> bool:
        """Whether learners are on several devices."""
        return len(self._devices) > 1

    def device_of(self, learner: int) -> str:
        """Returns where a learner computes."""
        return self._devices[learner % len(self._devices)]

    def prepare(self, step: LearnerStep) -> None:
        """Makes the copies that a training function needs and that are not there yet."""
        self._copies = {k: v for k, v in self._copies.items() if v[0]() is not None}
        untraced(lambda: self._make(step))

    def copies(self, variable: tf.Variable) -> list[tf.Variable]:
        """Returns every learner's own of a distributed variable; nothing if it is common to all."""
        ref, found = self._copies.get(id(variable), (lambda: None, []))
        return found if ref() is variable else []

    def captured(self, step: LearnerStep, learner: int) -> list[tf.Tensor]:
        """Returns what a training function captures when it is a learner's."""
        instead: dict[int, tf.Tensor] = {}
        for variable in (*step.trained, *step.statistics, *step.own):
            original = adapter.components(variable)[0]
            instead[id(original.handle)] = self.copies(variable)[learner].handle
        for variable in step.metrics:
            parts = adapter.components(variable)
            instead[id(parts[0].handle)] = parts[learner].handle
        return [instead.get(id(t), t) for t in step.function.captured_inputs]

    def distances(self) -> list[float]:
        """Returns how far each learner is from the central model, in lengths of that."""
        squares, length, _ = self._squares()
        return [math.sqrt(s / length) if length else 0.0 for s in squares]

    def distance(self) -> float | None:
        """Returns the root mean square of all learners' differences from the central model."""
        squares, _, size = self._squares()
        return math.sqrt(sum(squares) / (size * self.count)) if size else None

    def _squares(self) -> tuple[list[float], float, int]:
        """Returns the squares of learners' distances and of the central model, and its size."""
        apart, length, size = [0.0] * self.count, 0.0, 0
        for ref, copies in self._copies.values():
            variable = ref()
            if variable is None or not variable.trainable:
                continue
            model = adapter.components(variable)[0].numpy().astype(np.float64)
            length += float(np.sum(model**2))
            size += model.size
            for number, copy in enumerate(copies):
                apart[number] += float(np.sum((copy.numpy() - model) ** 2))
        return apart, length, size

    def restart(self, variables: Iterable[tf.Variable] | None = None) -> None:
        """Gives every learner the values of the program's own variables, outside of a graph.

        Args:
            variables: Which; all by default.
        """
        if variables is None:
            variables = [v for ref, _ in self._copies.values() if (v := ref()) is not None]
        for variable in variables:
            original = adapter.components(variable)[0]
            for number, copy in enumerate(self.copies(variable)):
                if copy is not original:
                    copy.assign(self._first_value(variable, number))

    def _make(self, step: LearnerStep) -> None:
        for variable in (*step.trained, *step.statistics):
            self._add(variable, first=0)
        for variable in step.own:
            self._add(variable, first=1)
        for variable in step.metrics:
            self._add_to_metric(variable)

    def _add(self, variable: tf.Variable, first: int) -> None:
        copies = self.copies(variable)
        if not copies:
            copies = [adapter.components(variable)[0]] * first
            self._copies[id(variable)] = (weakref.ref(variable), copies)
        for number in range(len(copies), self.count):
            value, name = self._first_value(variable, number), f"{_name(variable)}/{number}"
            with tf.device(self.device_of(number)):
                copies.append(tf.Variable(value, trainable=False, name=name))

    def _add_to_metric(self, variable: tf.Variable) -> None:
        parts = adapter.components(variable)
        for number in range(len(parts), self.count):
            with tf.device(self.device_of(number)):
                value, name = tf.zeros_like(parts[0]), f"{_name(variable)}/{number}"
                adapter.add_component(variable, tf.Variable(value, trainable=False, name=name))
        self._metrics[id(variable)] = weakref.ref(variable)

    def _first_value(self, variable: tf.Variable, number: int) -> Any:
        value = adapter.components(variable)[0].read_value()
        if number and vars_lib.is_random_state(variable):
            # Numbers that no other learner of the job has.
            return other_state(value.numpy(), self._worker + self._num_workers * number)
        return value


def _name(variable: tf.Variable) -> str:
    return variable.name.split(":")[0]
