"""How a worker that comes too late for a round applies its result."""

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
