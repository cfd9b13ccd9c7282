"""What a loss-scale optimizer is given by several workers. It touches nothing private."""

from typing import Any

import keras
import tensorflow as tf


def accumulates(optimizer: keras.optimizers.LossScaleOptimizer) -> bool:
    """Returns whether the optimizer within adds gradients up before it applies them."""
    return bool(getattr(optimizer.inner_optimizer, "gradient_accumulation_steps", None))


def zero_unless_finite(optimizer: keras.optimizers.LossScaleOptimizer, gradients: list) -> list:
    """Returns gradients that a worker can add to its own although the others did not see them.

    A round may have closed as finite without this worker, whose gradients are not.
    """
    finite = optimizer.check_finite(gradients)

    def cleaned(gradient: Any) -> Any:
        return tf.nest.map_structure(
            lambda t: tf.where(finite, t, tf.zeros_like(t)) if t.dtype.is_floating else t,
            gradient,
            expand_composites=True,
        )

    return [g if g is None else cleaned(g) for g in gradients]
