"""Updates of variables that are one operation each, as an optimizer's kernels are."""

import tensorflow as tf


def watch(variable: tf.Variable) -> None:
    """Lets the graph that is being built know that it uses a variable.

    It knows by itself of variables that are read, but not of those that are only updated.

    Args:
        variable: The variable.
    """
    graph = tf.compat.v1.get_default_graph()
    if hasattr(graph, "watch_variable"):
        graph.watch_variable(variable)


def add(variable: tf.Variable, value: tf.Tensor, factor: float) -> None:
    """Adds `factor * value` to a variable.

    Args:
        variable: The variable; a plain one, not distributed.
        value: A tensor of its shape and dtype.
        factor: What the value is multiplied with.
    """
    tf.raw_ops.ResourceApplyGradientDescent(
        var=variable.handle, alpha=tf.constant(-factor, value.dtype), delta=value
    )


def add_with_momentum(
    variable: tf.Variable, move: tf.Variable, value: tf.Tensor, momentum: float
) -> None:
    """Sets `move` to `momentum * move + value`, and adds it to a variable.

    Args:
        variable: The variable; a plain one, not distributed.
        move: How it moved last; another one like it.
        value: A tensor of their shape and dtype.
        momentum: How much of the last move is kept.
    """
    watch(move)
    tf.raw_ops.ResourceApplyMomentum(
        var=variable.handle,
        accum=move.handle,
        lr=tf.constant(-1, value.dtype),
        grad=value,
        momentum=tf.constant(momentum, value.dtype),
    )
