"""Builds the graph of a training run: compute, or replay, or skip.

    if this round is still open:     fn()    forward, backward, push, receive, apply
    else if it is over:              replay  apply the stored result, skip forward and backward
    else if the state is further:    skip    nothing

`fn` is traced once, into a function of its own, which tells whether it has an exchange at all and
which optimizers apply the result. A function without exchange is called as it is.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_syncdist.propagation.slices import TensorSpec
from tf_syncdist.strategies import adapter
from tf_syncdist.strategies.controller import Mode, RunController

# float16 and bfloat16 are widened, so that sums are made in float32.
_WIRE_DTYPES = {
    tf.float16: tf.float32,
    tf.bfloat16: tf.float32,
    tf.float32: tf.float32,
    tf.float64: tf.float64,
    tf.int32: tf.int32,
    tf.int64: tf.int64,
}


class Site:
    """One place in a program where training runs happen: one trace of one replica function."""

    def __init__(self, is_probe: bool = False) -> None:
        self.is_probe = is_probe
        self.eager_outputs: Any = None
        self.outputs: list[np.ndarray] | None = None
        self.replayable = False
        self.synchronised = False
        self.variables: list[tf.Variable] | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets what was found; TensorFlow traces again when variables were created."""
        self.exchanges = 0
        self.updates: list[tuple[object, list[tf.Variable]]] = []
        self.last_exchange: tf.Operation | None = None
        self.replaying = False


class Runs(adapter.Hooks):
    """Turns `strategy.run(fn)` into runs.

    Args:
        strategy: The strategy.
        controller: Takes this worker through its runs.
        replicas: Number of replicas over which a loss is averaged: N x devices.
        local_only: Tells whether exchanges stay within this worker now (evaluate and predict).
        on_variable: Is told of every variable made under the strategy's scope.
        on_traced: Is told of every site, once it is known what it does.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        replicas: int,
        local_only: Callable[[], bool],
        on_variable: Callable[[tf.Variable], None],
        on_traced: Callable[[Site], None],
    ) -> None:
        self.controller: RunController | None = None
        self._strategy = strategy
        self._replicas = replicas
        self._local_only = local_only
        self._on_traced = on_traced
        self.on_variable = on_variable
        self._current = threading.local()
        self._eager_sites: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        # Orders the runs of a graph: every run reads it first and writes it last.
        with tf.init_scope():
            self._token = tf.Variable(0, dtype=tf.int64, trainable=False, name="tf_syncdist_run")
            # When the first and the last run ended, for a single worker without service.
            self._ends = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)

    def counted_alone(self) -> tuple[int, float]:
        """Returns a single worker's updates, and the seconds from the first to the last."""
        first, last = self._ends.numpy()
        return int(self._token.numpy()), float(last - first)

    # What a strategy's run() calls.

    @property
    def site(self) -> Site | None:
        """The site that is being traced or executed on this thread."""
        return getattr(self._current, "site", None)

    def run_in_graph(self, fn: Callable[[], Any], inputs: Any) -> Any:
        """Emits one run of a replica function into the graph that is being built.

        Args:
            fn: The function.
            inputs: What it is given. A run begins when that is there: an iterator that has come
                to its end must not begin a run.
        """
        site = Site()

        @tf.function(autograph=False)
        def compute() -> Any:
            site.reset()
            with self._at(site):
                return fn()

        traced = compute.get_concrete_function()
        if not site.exchanges:
            return traced()
        site.variables = list(traced.graph.variables)
        self._on_traced(site)
        outputs = tf.nest.flatten(traced.structured_outputs, expand_composites=True)
        tensors = [o for o in outputs if tf.is_tensor(o)]
        _check_outputs(tensors)
        site.replayable = len(site.updates) == site.exchanges

        def finish(after: tf.Operation | None, values: Sequence[tf.Tensor]) -> None:
            with tf.control_dependencies([after] if after is not None else []):
                done = tf.numpy_function(
                    lambda *arrays: self.controller.finish(site, arrays), values, []
                )
            with tf.control_dependencies([done]):
                self._token.assign_add(1, read_value=False)

        def computed() -> Any:
            result = traced()
            call = adapter.last_call()
            flat = tf.nest.flatten(result, expand_composites=True)
            finish(call, [o for o in flat if tf.is_tensor(o)])
            return result

        def kept() -> Any:
            values = []
            if tensors:
                dtypes = [t.dtype for t in tensors]
                values = tf.numpy_function(lambda: _kept_outputs(site, tensors), [], dtypes)
            for value, like in zip(values, tensors, strict=True):
                value.set_shape(like.shape)
            remaining = iter(values)
            filled = [next(remaining) if tf.is_tensor(o) else o for o in outputs]
            return tf.nest.pack_sequence_as(
                traced.structured_outputs, filled, expand_composites=True
            )

        def replayed() -> Any:
            finish(self._replay(site), [])
            return kept()

        def skipped() -> Any:
            finish(None, [])
            return kept()

        def left_out() -> Any:
            if not site.replayable:
                return skipped()
            return tf.cond(tf.equal(mode, Mode.REPLAY), replayed, skipped)

        given = tf.nest.flatten(inputs, expand_composites=True)
        with tf.control_dependencies(
            [self._token.read_value(), *filter(tf.is_symbolic_tensor, given)]
        ):
            mode = tf.numpy_function(
                lambda: np.int32(self.controller.begin(site)), [], tf.int32, name="begin_run"
            )
        mode.set_shape(())
        return tf.cond(tf.equal(mode, Mode.COMPUTE), computed, left_out)

    def run_eagerly(self, given: Callable, fn: Callable[[], Any], training: bool) -> Any:
        """Executes one run of a replica function without a graph.

        Args:
            given: The function as the user gave it, which tells one place from another.
            fn: Executes it.
            training: Whether it is known to have an exchange.
        """
        # A bound method is made anew for each call; its object and its function stay.
        owner, function = getattr(given, "__self__", given), getattr(given, "__func__", given)
        sites = self._eager_sites.setdefault(owner, weakref.WeakKeyDictionary())
        site = sites.get(function)
        if site is None and training:
            site = sites[function] = Site()
        if site is None:
            return self._try_eagerly(given, fn)
        mode = self.controller.begin(site)
        with self._at(site):
            if mode is Mode.COMPUTE:
                site.reset()
                site.eager_outputs = fn()
                site.replayable = len(site.updates) == site.exchanges
                # Only now is it known which optimizers there are, and what they hold.
                site.synchronised = False
                self._on_traced(site)
            elif mode is Mode.REPLAY:
                site.replaying = True
                self._apply(site.updates)
                site.replaying = False
        self.controller.finish(site, [])
        return site.eager_outputs

    def _try_eagerly(self, given: Callable, fn: Callable[[], Any]) -> Any:
        probe = Site(is_probe=True)
        try:
            with self._at(probe):
                return fn()
        except _TrainingFound:
            return self.run_eagerly(given, fn, training=True)

    # Hooks.

    def all_reduce(self, reduce_op: tf.distribute.ReduceOp, values: list) -> list:
        site = self.site
        if site is None or self._local_only():
            return values
        if site.is_probe:
            raise _TrainingFound
        wire = [self._widen(v) for v in values]
        if site.replaying:
            results = self._emit(site, self._stored_fn(wire), [], wire)
        else:
            site.exchanges += 1
            results = self._emit(site, self._exchange_fn(), wire, wire)
        scale = self._replicas if reduce_op == tf.distribute.ReduceOp.MEAN else 1
        return [
            tf.cast(r if scale == 1 else r / tf.cast(scale, r.dtype), v.dtype)
            for r, v in zip(results, values, strict=True)
        ]

    def on_update(self, optimizer: object, variables: list) -> None:
        site = self.site
        if self.controller is None:
            now = tf.timestamp()
            self._token.assign_add(1, read_value=False)
            self._ends.assign([tf.where(self._ends[0] > 0, self._ends[0], now), now])
        if site is not None and not site.replaying:
            site.updates.append((optimizer, variables))

    # How.

    @contextlib.contextmanager
    def _at(self, site: Site) -> Iterator[None]:
        before, self._current.site = self.site, site
        try:
            yield
        finally:
            self._current.site = before

    def _widen(self, value: tf.Tensor) -> tf.Tensor:
        if value.dtype not in _WIRE_DTYPES:
            raise TypeError(
                f"Expected all_reduce of floats or integers. Received: a tensor of dtype "
                f"{value.dtype.name} ({value}). Cast it before the exchange."
            )
        return tf.cast(value, _WIRE_DTYPES[value.dtype])

    def _emit(
        self, site: Site, fn: Callable, inputs: Sequence[tf.Tensor], likes: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        if tf.executing_eagerly():
            return [tf.convert_to_tensor(r) for r in fn(*[i.numpy() for i in inputs])]
        # Exchanges of a run are numbered as they are executed, so workers must execute them alike.
        graph = tf.compat.v1.get_default_graph()
        before = site.last_exchange
        after = [before] if before is not None and before.graph is graph else []
        with tf.control_dependencies(after):
            results = tf.numpy_function(fn, inputs, [v.dtype for v in likes], name="exchange")
        results = list(results) if isinstance(results, list | tuple) else [results]
        for result, like in zip(results, likes, strict=True):
            result.set_shape(like.shape)
        site.last_exchange = results[0].op
        return results

    def _exchange_fn(self) -> Callable:
        return lambda *arrays: self.controller.exchange([np.asarray(a) for a in arrays])

    def _stored_fn(self, likes: Sequence[tf.Tensor]) -> Callable:
        specs = [TensorSpec(v.dtype.name, tuple(v.shape.as_list())) for v in likes]
        return lambda: self.controller.stored(specs)

    def _replay(self, site: Site) -> tf.Operation | None:
        """Applies the stored results through the optimizers that applied the computed ones."""
        site.replaying = True

        @tf.function(autograph=False)
        def apply() -> None:
            site.last_exchange = None
            with self._at(site):
                self._apply(site.updates)

        try:
            apply.get_concrete_function()()
            return adapter.last_call()
        finally:
            site.replaying = False

    def _apply(self, updates: list[tuple[object, list[tf.Variable]]]) -> None:
        with self._strategy.scope():
            self._strategy.extended.call_for_each_replica(lambda: _apply_all(updates))


def _check_outputs(tensors: Sequence[tf.Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype in (tf.variant, tf.resource):
            raise TypeError(
                "Expected a training function that returns tensors of numbers or strings, because "
                "a worker that skips a round returns its previous outputs. "
                f"Received: a tensor of dtype {tensor.dtype.name} ({tensor.name}). Do not return "
                "TensorArrays, datasets or iterators from the function given to strategy.run."
            )


class _TrainingFound(BaseException):
    """Unwinds an eager function when its first exchange shows that it is a training run."""


def _apply_all(updates: list[tuple[object, list[tf.Variable]]]) -> None:
    for optimizer, variables in updates:
        by_value = {id(v.value): v for v in optimizer._trainable_variables}
        # Constraints and weight decay look at Keras' variables, not at TensorFlow's inside them.
        keras_variables = [by_value.get(id(v), v) for v in variables]
        zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
        optimizer.apply(zeros, keras_variables)


def _kept_outputs(site: Site, likes: Sequence[tf.Tensor]) -> list[np.ndarray]:
    if site.outputs is not None:
        return site.outputs
    # Only a run that is skipped before any other has no outputs to return.
    return [np.zeros([d or 0 for d in t.shape.as_list()], t.dtype.as_numpy_dtype) for t in likes]
