"""Builds the graph of a training run: compute, or replay, or skip.

    if this round is still open:     fn()    forward, backward, push, receive, apply
    else if it is over:              replay  apply the stored result, skip forward and backward
    else if the state is further:    skip    nothing

`fn` is traced once, into a function of its own, which tells whether it has an exchange at all and
which optimizers apply the result. A function without exchange is called as it is.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter, traces
from tf_syncdist.strategies.controller import Mode
from tf_syncdist.strategies.replays import apply_updates
from tf_syncdist.strategies.runs import Runs
from tf_syncdist.strategies.site import Site
from tf_syncdist.strategies.variables import is_local


def run_in_graph(runs: Runs, fn: Callable[[], Any], inputs: Any) -> Any:
    """Emits one run of a replica function into the graph that is being built.

    Args:
        runs: Whose run it is.
        fn: The function.
        inputs: What it is given. A run begins when that is there: an iterator that has come to its
            end must not begin a run.
    """
    site = Site()

    def compute() -> Any:
        site.reset()
        runs.fold_seed()
        with runs.at(site):
            return fn()

    traced = _trace_deferred(runs, site, compute)
    if traced is None:
        traced = tf.function(compute, autograph=False).get_concrete_function()
    if not site.exchanges and (runs.stays_local() or not traces.has_exchange(traced)):
        site.deferral = None
        return _called_alone(runs, traced)
    check_not_compiled()
    site.variables = list(traced.graph.variables)
    writes = traces.count_writes(traced)
    if site.deferral is not None:
        with runs.at(site):
            update = site.deferral.prepare()
        writes += traces.count_writes(update)
        # What an optimizer holds is used there only; whoever takes over a state needs it as well.
        known = {id(v) for v in site.variables}
        site.variables += [v for v in update.graph.variables if id(v) not in known]
    site.written = [v for v in site.variables if writes[id(v)]]
    runs.on_traced(site)
    outputs = tf.nest.flatten(traced.structured_outputs, expand_composites=True)
    tensors = [o for o in outputs if tf.is_tensor(o)]
    _check_outputs(tensors)

    @tf.function(autograph=False)
    def apply() -> None:
        site.begin_replay()
        try:
            with runs.at(site):
                apply_updates(runs.strategy, site.updates)
        finally:
            site.replaying = False

    replay = None
    if runs.has_learners:
        # A stored result is only what they are corrected by.
        site.unlike_replay = "its learners take steps of their own"
    else:
        try:
            replay = apply.get_concrete_function()
            site.unlike_replay = _first_difference(runs, site, writes, traces.count_writes(replay))
        except Exception as e:  # noqa: BLE001 - whatever an optimizer of the user's own objects to
            site.unlike_replay = f"its optimizer cannot apply stored results ({e})"

    def finish(after: tf.Operation | None, values: Sequence[tf.Tensor]) -> None:
        with tf.control_dependencies([after] if after is not None else []):
            done = tf.numpy_function(
                lambda *arrays: runs.controller.finish(site, arrays), values, []
            )
        with tf.control_dependencies([done]):
            runs.token.assign_add(1, read_value=False)

    def continued() -> Any:
        site.reset()
        runs.fold_seed()
        with runs.at(site):
            site.deferral.emit_update(mode)
            return fn()

    def computed(traced: Any = traced) -> Any:
        result = traced()
        call = traces.last_call()
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
        return tf.nest.pack_sequence_as(traced.structured_outputs, filled, expand_composites=True)

    def replayed() -> Any:
        replay()
        finish(traces.last_call(), [])
        return kept()

    def skipped() -> Any:
        finish(None, [])
        return kept()

    def left_out() -> Any:
        if site.unlike_replay:
            return skipped()
        return tf.cond(tf.equal(mode, Mode.REPLAY), replayed, skipped)

    given = tf.nest.flatten(inputs, expand_composites=True)
    with tf.control_dependencies([runs.token.read_value(), *filter(tf.is_symbolic_tensor, given)]):
        mode = tf.numpy_function(
            lambda: np.int32(runs.controller.begin(site)), [], tf.int32, name="begin_run"
        )
    mode.set_shape(())
    if site.deferral is None:
        return tf.cond(tf.equal(mode, Mode.COMPUTE), computed, left_out)
    steady = tf.function(continued, autograph=False).get_concrete_function()

    def others() -> Any:
        return tf.cond(tf.equal(mode, Mode.COMPUTE), computed, left_out)

    return tf.cond(tf.equal(mode, Mode.CONTINUE), functools.partial(computed, steady), others)


def check_not_compiled() -> None:
    """Checks that XLA is not going to compile the run that is being emitted.

    Raises:
        ValueError: If it is.
    """
    if adapter.is_compiled():
        raise ValueError(
            "Expected a training function that is not compiled as a whole, because what workers "
            "exchange leaves it through Python, which XLA cannot do. Received: one in a "
            "tf.function(jit_compile=True). Leave jit_compile out there, and compile parts that "
            "exchange nothing, such as the forward pass."
        )


def _called_alone(runs: Runs, traced: Any) -> Any:
    """Calls a function that is no run; an update that waits for the next run is made first."""
    if not runs.watches_variables:
        return traced()
    with tf.control_dependencies([runs.token.read_value()]):
        settled = tf.numpy_function(runs.controller.settle, [], [])
    with tf.control_dependencies([settled]):
        return traced()


def _trace_deferred(runs: Runs, site: Site, compute: Callable[[], Any]) -> Any:
    """Traces a training function whose update waits for the next run, if it may.

    Returns:
        A concrete function, or `None`.
    """
    site.deferral = runs.deferral()
    if site.deferral is None:
        return None
    traced = tf.function(compute, autograph=False).get_concrete_function()
    if not site.exchanges:
        return traced
    site.deferral.check(traced.graph)
    if not site.deferral.why_not:
        return traced
    runs.say_not_deferred(site.deferral.why_not)
    site.deferral = None
    return None


def _first_difference(
    runs: Runs, site: Site, computed: Counter[int], replayed: Counter[int]
) -> str:
    """Says what the function does that a replay of its updates does not, or nothing."""
    if site.exchanges != site.replayed_exchanges:
        return (
            "its exchanges are not one after the other inside of the same Keras optimizers, but "
            "for instance in a condition, in a loop or applied by hand"
        )
    inside = runs.registry.containers(site.variables)
    outside = [v for v in site.variables if not runs.registry.knows(v)]
    for variable in (*inside, *outside):
        copies = () if is_local(variable) else adapter.components(variable)
        if any(computed[id(v)] != replayed[id(v)] for v in copies):
            return f"it writes the variable {variable.name.split(':')[0]!r} besides"
    return ""


def _check_outputs(tensors: Sequence[tf.Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype in (tf.variant, tf.resource):
            raise TypeError(
                "Expected a training function that returns tensors of numbers or strings, because "
                "a worker that skips a round returns its previous outputs. "
                f"Received: a tensor of dtype {tensor.dtype.name} ({tensor.name}). Do not return "
                "TensorArrays, datasets or iterators from the function given to strategy.run."
            )


def _kept_outputs(site: Site, likes: Sequence[tf.Tensor]) -> list[np.ndarray]:
    if site.outputs is not None:
        return site.outputs
    # Only a run that is skipped before any other has no outputs to return.
    return [np.zeros([d or 0 for d in t.shape.as_list()], t.dtype.as_numpy_dtype) for t in likes]
