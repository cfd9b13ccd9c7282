"""An update that is made where the next run begins, layer by layer, as the results come (P3).

    apply round r-1, variable by variable, in forward order  ->  forward, backward of round r  ->
    push slices, do not wait

TensorFlow's executor follows the data: the forward pass of a layer starts as soon as its variables
are updated. Whether a training function allows that is found while it is traced.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_syncdist.propagation.slices import Plan, TensorSpec
from tf_syncdist.strategies import adapter, traces, watched
from tf_syncdist.strategies.controller import RunController

_NEVER_USED = 2**31


class DeferredUpdate:
    """The only exchange of a training function, and the optimizer's update that follows it.

    Args:
        strategy: The strategy.
        controller: What the graph calls.

    Attributes:
        why_not: Why the update cannot wait; empty as long as it can.
        way: How the exchange is cut; `None` before it is known.
    """

    def __init__(self, strategy: tf.distribute.Strategy, controller: RunController) -> None:
        self.why_not = ""
        self.way: Plan | None = None
        self._strategy = strategy
        self._controller = controller
        self._held: list[tf.Tensor] = []
        self._wire: list[tf.Tensor | tf.IndexedSlices] = []
        self._dtypes: list[tf.DType] = []
        self._pushed = 0
        self._before: list[tf.Tensor] = []
        self._settled: Callable | None = None
        self._ids: set[int] = set()

    # While the function is traced.

    def refuse(self, why: str) -> None:
        """Takes note that the update cannot wait, and why."""
        self.why_not = self.why_not or why

    def hold(
        self, reduce_op: tf.distribute.ReduceOp, values: Sequence, wire: Sequence, nested: bool
    ) -> list[tf.Tensor] | None:
        """Keeps the values of an exchange until the update that they are for is known.

        Returns:
            Tensors that stand for the results and are not to be computed with; `None` if the
            exchange has to be made now.
        """
        if self._held:
            self.refuse("it has several exchanges")
        if nested:
            self.refuse("its update is in a condition, a loop or a function of its own")
        if reduce_op != tf.distribute.ReduceOp.SUM:
            self.refuse("it reduces a mean")
        if not all(v.shape.is_fully_defined() for v in wire):
            self.refuse("the shape of a gradient is not known")
        if self.why_not:
            return None
        self._wire = list(wire)
        self._dtypes = [v.dtype for v in values]
        self._held = [tf.zeros(v.shape, v.dtype) for v in values]
        return list(self._held)

    def takes(self, gradients: Sequence[tf.Tensor]) -> bool:
        """Returns whether these are the results that were held back, all of them and unchanged."""
        if not self._held or self._pushed or self.why_not:
            return False
        found = [_source(g) for g in gradients]
        return len(found) == len(self._held) and all(
            a is b for a, b in zip(found, self._held, strict=True)
        )

    def push(
        self,
        emit: Callable[[Callable, Sequence[tf.Tensor]], None],
        optimizer: Any,
        variables: Sequence[tf.Variable],
        learning_rate: tf.Tensor,
        apply: Callable[[list, Any, Sequence[int]], Any],
    ) -> None:
        """Sends the values, now that it is known which variables they are for.

        Args:
            emit: Makes an operation that calls a function with arrays, after the exchanges before.
            optimizer: The optimizer.
            variables: What it updates.
            learning_rate: Of this run.
            apply: Updates some of the variables with their reduced gradients.
        """
        graph = tf.compat.v1.get_default_graph()
        if self.way is None:
            specs = [
                TensorSpec(v.dtype.name, tuple(v.shape), isinstance(v, tf.IndexedSlices))
                for v in self._wire
            ]
            self.way = self._controller.plan(specs, _first_uses(graph, variables))
            self._optimizer, self._variables, self._apply = optimizer, list(variables), apply
            self._updates = [self._update_of(b.tensors) for b in self.way.buckets]
            # Of these the update is given the values that they have in this run.
            given = ("iteration", "learning_rate")
            slots = [v for v in optimizer.variables if v.path.rsplit("/")[-1] not in given]
            self._slots = [*variables, *(v.value for v in slots)]
            self._ids = {id(v) for v in self._slots}
            self._settings = (learning_rate.dtype, optimizer.iterations.value.dtype)
        step = tf.convert_to_tensor(optimizer.iterations.value)
        buckets = self.way.buckets
        last = max(len(buckets) - 1, 0) if self._controller.offers_early else 0
        # The service is to hear that the run before is done before it hears of this one.
        before, self._before = self._before, []
        for number, bucket in enumerate(buckets[:last]):
            offer = functools.partial(_offer, self._controller, self.way, number, len(before))
            emit(offer, [*before, *self._parts(bucket.tensors)])
            before = []
        rest = [t for bucket in buckets[last:] for t in bucket.tensors]
        offer = functools.partial(_offer_last, self._controller, self.way, last, len(before))
        emit(offer, [*before, learning_rate, step, *self._parts(rest)])
        self._pushed = len(graph.get_operations())

    def check(self, graph: tf.Graph) -> None:
        """Looks, in the complete trace, for what needs the update within the run itself."""
        if not self._held:
            self.refuse("it has no exchange of a Keras optimizer")
        elif not self._pushed:
            self.refuse("its gradients are not applied by a Keras optimizer as they come")
        if self.why_not:
            return
        if any(map(_is_used, self._held)):
            self.refuse("it computes with the reduced gradients")
        handles = _handles(graph, self._slots)
        for op in graph.get_operations()[self._pushed :]:
            for tensor in op.inputs:
                if id(tensor) in handles:
                    name = handles[id(tensor)].name.split(":")[0]
                    self.refuse(f"it uses the variable {name!r} after the update")

    def begin_trace(self) -> None:
        """Takes note that the function is traced again."""
        self._held, self._wire, self._pushed, self._before = [], [], 0, []

    # In the run that follows.

    def emit_update(self, begun: tf.Tensor) -> None:
        """Emits the update of the run before into the graph of this one.

        TensorFlow executes stateful operations without variables in the order of their creation, so
        the forward pass would wait for these. They are called stateless, and given something that
        differs from run to run: whatever depends on constants only is computed once.

        Args:
            begun: A tensor that is there when the run has begun.
        """
        controller, way = self._controller, self.way
        learning_rate, step = tf.numpy_function(
            lambda _: controller.pending_settings(), [begun], self._settings, stateful=False
        )
        learning_rate.set_shape(())
        step.set_shape(())
        token, updates = begun, []
        for number in reversed(range(len(way.buckets))):
            tensors = way.buckets[number].tensors
            # One receive waits at a time: each holds one of TensorFlow's threads.
            token, *results = tf.numpy_function(
                functools.partial(_received, controller, number),
                [token],
                [begun.dtype, *(tf.as_dtype(way.specs[t].dtype) for t in tensors)],
                stateful=False,
            )
            for result, tensor in zip(results, tensors, strict=True):
                result.set_shape(way.specs[tensor].shape)
            self._updates[number](tuple(results), learning_rate, step)
            updates.append(traces.last_call())
        with tf.control_dependencies(updates):
            # What nobody takes a value of is left out, although others wait for it.
            done = tf.numpy_function(
                functools.partial(_finished, controller), [token], begun.dtype, stateful=False
            )
        self._before = [done]

    def update_all(self, results: Sequence[tf.Tensor], learning_rate: Any, step: Any) -> None:
        """Makes the whole update, by the very functions that make it in parts."""
        for number in reversed(range(len(self.way.buckets))):
            tensors = self.way.buckets[number].tensors
            self._updates[number](tuple(results[t] for t in tensors), learning_rate, step)

    def prepare(self) -> Any:
        """Traces the update that is made outside of runs, and returns that function."""
        specs = [tf.TensorSpec(s.shape, tf.as_dtype(s.dtype)) for s in self.way.specs]
        function = tf.function(self.update_all, autograph=False)
        self._settled = function.get_concrete_function(
            specs, *(tf.TensorSpec((), dtype) for dtype in self._settings)
        )
        return self._settled

    def apply_pending(self, arrays: Sequence[np.ndarray], settings: Sequence[np.ndarray]) -> None:
        """Makes the update, outside of a run."""
        given = [tf.constant(a, s.dtype) for a, s in zip(arrays, self.way.specs, strict=True)]
        rate, step = (tf.constant(s, d) for s, d in zip(settings, self._settings, strict=True))
        self._settled(given, rate, step)

    def defers_update_of(self, variable: int) -> bool:
        """Returns whether a variable, by its identity, is updated by what is deferred."""
        return variable in self._ids

    # How.

    def _parts(self, tensors: Sequence[int]) -> list[tf.Tensor]:
        return parts(self._wire[t] for t in tensors)

    def _update_of(self, tensors: Sequence[int]) -> Callable:
        """Returns the function that updates some variables, the same wherever it is called from."""

        def update(results: tuple, learning_rate: tf.Tensor, step: tf.Tensor) -> None:
            gradients = [
                traces.widened(r, self._dtypes[t]) for r, t in zip(results, tensors, strict=True)
            ]
            # The optimizer counts its iterations when the run is done, not when it is updated.
            counts = watched.substituted(self._optimizer.iterations.value, step)
            with self._strategy.scope(), counts:
                self._apply(gradients, learning_rate, tensors)

        return tf.function(update, autograph=False)


def _offer(
    controller: RunController, way: Plan, number: int, skipped: int, *arrays: np.ndarray
) -> None:
    controller.offer(way, number, arrays[skipped:])


def _offer_last(
    controller: RunController, way: Plan, number: int, skipped: int, *arrays: np.ndarray
) -> None:
    rate, step, *rest = arrays[skipped:]
    controller.offer_last(way, number, [rate, step], rest)


def _received(controller: RunController, number: int, token: np.ndarray) -> list[np.ndarray]:
    return [token, *controller.pending_part(number)]


def _finished(controller: RunController, token: np.ndarray) -> np.ndarray:
    controller.finish_pending()
    return token


def parts(values: Any) -> list[tf.Tensor]:
    """Returns tensors as they are, and rows of a table as their numbers and themselves."""
    found = []
    for value in values:
        found += [value.indices, value.values] if isinstance(value, tf.IndexedSlices) else [value]
    return found


def _source(tensor: tf.Tensor) -> tf.Tensor:
    """Returns what a tensor is the same as."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def _is_used(tensor: tf.Tensor) -> bool:
    """Returns whether anything is computed with a tensor."""
    for op in tensor.consumers():
        if op.type not in ("Identity", "IdentityN"):
            return True
        same = (out for given, out in zip(op.inputs, op.outputs, strict=True) if given is tensor)
        if any(map(_is_used, same)):
            return True
    return False


def _handles(graph: tf.Graph, variables: Sequence[tf.Variable]) -> dict[int, tf.Variable]:
    """Returns the graph's tensors, by their identity, through which it reaches variables."""
    by_handle = {id(c.handle): v for v in variables for c in adapter.components(v)}
    return {
        id(inner): by_handle[id(outer)] for outer, inner in graph.captures if id(outer) in by_handle
    }


def _first_uses(graph: tf.Graph, variables: Sequence[tf.Variable]) -> list[int]:
    """Returns when the forward pass uses each variable first: 0 for the first one.

    A function that is being traced has the operations of its forward pass first, in their order.
    """
    handles = _handles(graph, variables)
    first: dict[int, int] = {}
    for number, op in enumerate(graph.get_operations()):
        for tensor in op.inputs:
            if id(tensor) in handles:
                first.setdefault(id(handles[id(tensor)]), number)
    at = [first.get(id(v), _NEVER_USED) for v in variables]
    rank = {number: r for r, number in enumerate(sorted(set(at)))}
    return [rank[number] for number in at]
