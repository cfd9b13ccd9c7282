"""How a worker that comes too late for a round applies its result."""

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter

Updates = list[tuple[object, list[tf.Variable]]]


def apply_updates(strategy: tf.distribute.Strategy, updates: Updates) -> None:
    """Lets optimizers update what they have updated; stored results stand in for gradients."""

    def apply() -> None:
        for optimizer, variables in updates:
            by_value = {id(v.value): v for v in adapter.trained_by(optimizer)}
            # Constraints and weight decay look at Keras' variables, not at TensorFlow's inside.
            keras_variables = [by_value.get(id(v), v) for v in variables]
            optimizer.apply([tf.zeros(v.shape, v.dtype) for v in variables], keras_variables)

    with strategy.scope():
        strategy.extended.call_for_each_replica(apply)


def foreign_change(updates: Updates, before: dict[int, tuple[tf.Variable, np.ndarray]]) -> str:
    """Says which variable has changed that is not the optimizers', or nothing."""
    owned = {id(v) for _, variables in updates for v in variables}
    owned |= {id(v.value) for optimizer, _ in updates for v in optimizer.variables}
    for variable, value in before.values():
        # Bits, because a variable that is not a number is not equal to itself.
        if id(variable) not in owned and value.tobytes() != variable.numpy().tobytes():
            return f"it writes the variable {variable.name.split(':')[0]!r} besides"
    return ""
