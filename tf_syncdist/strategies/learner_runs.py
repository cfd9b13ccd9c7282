"""Turns `strategy.run(fn)` into a run in which every learner of a worker makes its own step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_syncdist.strategies import adapter, watched
from tf_syncdist.strategies.learners import Learners, LearnerStep, sorted_out
from tf_syncdist.strategies.replays import Updates
from tf_syncdist.strategies.runs import Runs
from tf_syncdist.strategies.site import Site
from tf_syncdist.strategies.untraced import untraced


class Step:
    """One run of a worker's learners, while its graph is being built.

    A strategy's `_mix` is given it. What it emits before `compute` sees the models before the
    learners' steps, what it emits afterwards sees them after.

    Args:
        step: The training function.
        learners: The learners.
        compute: Emits the learners' steps.

    Attributes:
        trained: Distributed variables that are trained; they hold the central model.
        statistics: Other variables that learners have copies of. The central model's are the mean
            over the learners of this worker; that is seen to.
        updates: Optimizers with the variables that each of them updates.
        used: All variables that the function uses, as its graph has them.
    """

    def __init__(self, step: LearnerStep, learners: Learners, compute: Callable[[], Any]) -> None:
        self.trained = step.trained
        self.statistics = step.statistics
        self.updates = step.updates
        self.used = step.function.graph.variables
        self._learners = learners
        self._compute = compute

    @property
    def num_learners(self) -> int:
        """How many learners this worker has."""
        return self._learners.count

    def central(self, variables: Sequence[tf.Variable]) -> list[tf.Variable]:
        """Returns the variables that hold the central model."""
        return [adapter.components(v)[0] for v in variables]

    def learner(self, number: int, variables: Sequence[tf.Variable]) -> list[tf.Variable]:
        """Returns a learner's own variables."""
        return [self._learners.copies(v)[number] for v in variables]

    def compute(self) -> Any:
        """Lets every learner make its step, and returns what the steps return.

        It may be called in several branches of a condition, of which one is executed.
        """
        return self._compute()


class LearnerRuns(Runs):
    """Runs of learners, with mixing around their steps.

    Args:
        strategy: The strategy.
        learners: Its learners.
        mix: Emits one run, given a `Step`; returns what `Step.compute` returned.
        on_use: Called, outside of runs, with a variable before it is read or written.
        on_write: Called, outside of runs, with a variable after it was written.
        before_test: Emits what is to happen before a function that trains nothing is executed.
        others: See `Runs`.

    Attributes:
        is_alone: Whether what is traced now is no part of a job.
        on_emitted: Called, outside of the graph, when a run has been emitted and not yet executed.
    """

    has_learners = True

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        learners: Learners,
        mix: Callable[[Step], Any],
        on_use: Callable[[tf.Variable], None],
        on_write: Callable[[tf.Variable], None],
        before_test: Callable[[], list[tf.Operation]] = list,
        **others: Any,
    ) -> None:
        super().__init__(strategy, needs_all=True, **others)
        self._learners = learners
        self._mix = mix
        self._on_outside_use = on_use
        self._on_outside_write = on_write
        self._before_test = before_test
        self._kept: dict[Any, LearnerStep] | None = None
        self.is_alone = False
        self.on_emitted: Callable[[], None] | None = None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lets runs be traced that this worker does for itself, as if it were the only one."""
        self.is_alone = True
        try:
            yield
        finally:
            self.is_alone = False

    def keep_traces(self, keeps: bool) -> None:
        """Lets a function that is traced again for another number of learners be traced once.

        What is kept keeps the model alive.
        """
        self._kept = {} if keeps else None

    def emit(self, fn: Callable, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Emits one run into the graph that is being built.

        Args:
            fn: The replica function as the user gave it, which tells one place from another.
            call: Executes it for one replica, given its arguments.
            args: Its positional arguments; a PerReplica value has a part for each learner.
            kwargs: Its keyword arguments.

        Returns:
            What the function returns; with several learners, PerReplica values.
        """
        parts = _parts((args, kwargs))
        given = [adapter.part_of(n, (args, kwargs)) for n in range(parts or 1)]
        step = self._trace(fn, call, given)
        if not step.updates:
            function = step.function
            with tf.control_dependencies(self._before_test()):
                found = [
                    adapter.call_with(function, _tensors(g), function.captured_inputs)
                    for g in given
                ]
            return adapter.per_replica(found) if parts else found[0]
        learners = self._learners
        if parts and parts != learners.count:
            raise ValueError(
                "Expected a PerReplica value to have a part for each learner of this worker, as "
                "datasets have that this strategy distributes. "
                f"Received: {parts} parts for {learners.count} learners."
            )
        learners.prepare(step)
        tensors = [_tensors(given[n % len(given)]) for n in range(learners.count)]

        def compute() -> Any:
            found = []
            for number in range(learners.count):
                captured = learners.captured(step, number)
                with tf.device(learners.device_of(number) if learners.has_devices else None):
                    found.append(adapter.call_with(step.function, tensors[number], captured))
            self._average_statistics(step)
            return found[0] if learners.count == 1 else adapter.per_replica(found)

        if self.site is not None:
            self.site.updates = list(step.updates)
        found = self._mix(Step(step, learners, compute))
        if self.controller is None:
            self.count_alone()
        if self.on_emitted is not None:
            untraced(self.on_emitted)
        return found

    def _average_statistics(self, step: LearnerStep) -> None:
        for variable in step.statistics:
            copies = self._learners.copies(variable)
            mean = tf.reduce_mean(tf.stack([c.read_value() for c in copies]), axis=0)
            adapter.components(variable)[0].assign(mean, read_value=False)

    def _trace(self, fn: Callable, call: Callable, parts: Sequence[tuple]) -> LearnerStep:
        given = parts[0]
        flat = tf.nest.flatten(given, expand_composites=True)
        specs = [_common_spec(tensors) for tensors in zip(*map(_tensors, parts), strict=True)]
        # A bound method is made anew for each call; its object and its function stay.
        owner, function = getattr(fn, "__self__", fn), getattr(fn, "__func__", fn)
        key = (id(owner), id(function), tuple((str(s.shape), s.dtype) for s in specs))
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        probe = Site()

        def compute(*tensors: tf.Tensor) -> Any:
            probe.reset()
            self.fold_seed()
            remaining = iter(tensors)
            filled = [next(remaining) if _is_tensor(v) else v for v in flat]
            args, kwargs = tf.nest.pack_sequence_as(given, filled, expand_composites=True)
            with self.at(probe):
                return call(args, kwargs)

        function = tf.function(compute, autograph=False).get_concrete_function(*specs)
        step = sorted_out(function, list(probe.updates), self.registry)
        if self._kept is not None and not any(map(tf.is_symbolic_tensor, function.captured_inputs)):
            self._kept[key] = step
        return step

    # Hooks.

    def leaves_worker(self) -> bool:
        # A learner's step is its own; what leaves the worker is emitted by `mix`.
        return False

    def update(
        self,
        optimizer: object,
        variables: list,
        gradients: list,
        learning_rate: Any,
        apply: Callable[..., Any],
    ) -> Any:
        if self.site is None:
            return super().update(optimizer, variables, gradients, learning_rate, apply)
        if not self.site.replaying:
            updates: Updates = self.site.updates
            updates.append((optimizer, variables))
        return apply(gradients, learning_rate)

    def on_variable(self, variable: tf.Variable) -> None:
        watched.watch(variable, self._used, self._written)
        self.registry.add(variable)

    def on_update(self, variable: tf.Variable, by: Any) -> None:
        # Keras' optimizers overwrite a model with its average over time like this.
        self._written(variable, by)

    def _used(self, variable: tf.Variable) -> None:
        if self.site is None:
            self._on_outside_use(variable)

    def _written(self, variable: tf.Variable, by: Any) -> None:
        if self.site is None:
            after = [by] if tf.is_symbolic_tensor(by) or isinstance(by, tf.Operation) else []
            with tf.control_dependencies(after):
                self._on_outside_write(variable)


def _parts(values: Any) -> int:
    """Returns how many parts the PerReplica values of a nest have; 0 if there are none."""
    for value in tf.nest.flatten(values):
        if isinstance(value, tf.distribute.DistributedValues) and not isinstance(
            value, tf.Variable
        ):
            return len(value.values)
    return 0


def _tensors(given: Any) -> list[tf.Tensor]:
    return [t for t in tf.nest.flatten(given, expand_composites=True) if _is_tensor(t)]


def _common_spec(tensors: Sequence[tf.Tensor]) -> tf.TensorSpec:
    """Returns what the tensors of all learners are."""
    shape = tensors[0].shape
    for tensor in tensors[1:]:
        shape = shape.most_specific_compatible_shape(tensor.shape)
    return tf.TensorSpec(shape, tensors[0].dtype)


def _is_tensor(value: Any) -> bool:
    return tf.is_tensor(value) and not isinstance(value, tf.Variable)
