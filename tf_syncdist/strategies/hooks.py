"""What a strategy is asked and told while TensorFlow and Keras trace a training function."""

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf


class Hooks:
    """What a strategy is asked while functions are traced. The defaults are for one worker."""

    def carried(self) -> Callable[[], contextlib.AbstractContextManager]:
        """Returns what a replica's thread enters to be seen as part of this one."""
        return contextlib.nullcontext

    def leaves_worker(self) -> bool:
        """Returns whether reductions are over all workers now, and not over one's devices."""
        return False

    def all_reduce(self, reduce_op: tf.distribute.ReduceOp, values: list) -> list:
        """Reduces values, already summed over this worker's devices, over all workers.

        `tf.IndexedSlices` come from a worker with one device only; their result is a tensor.
        """
        del reduce_op
        return values

    def all_finite(self, optimizer: object, finite: tf.Tensor) -> tf.Tensor:
        """Returns whether the gradients of all workers are finite, for a loss-scale optimizer."""
        del optimizer
        return finite

    def on_gradient_of_exchange(self) -> None:
        """Is told that an exchange is part of what is differentiated."""

    def update(
        self,
        optimizer: object,
        variables: list,
        gradients: list,
        learning_rate: Any,
        apply: Callable[..., Any],
    ) -> Any:
        """Lets an optimizer update variables with reduced gradients.

        Args:
            optimizer: The optimizer.
            variables: The variables.
            gradients: Their gradients.
            learning_rate: Of this update.
            apply: Makes the update, given gradients and learning rate, of all variables or of those
                with the numbers that are given besides.
        """
        del optimizer, variables
        return apply(gradients, learning_rate)

    def on_variable(self, variable: tf.Variable) -> None:
        """Is told of every variable made under the strategy's scope."""

    def on_update(self, variable: tf.Variable, by: Any) -> None:
        """Is told of a variable after `strategy.extended.update` was called with it.

        Args:
            variable: The variable.
            by: What the call returns; in a graph, what updates the variable.
        """
