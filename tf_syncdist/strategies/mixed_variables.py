"""The variables of a training function that are mixed: as its learner and its program have them.

On the wire they are float32, or float64 if they are that wide.
"""

import weakref
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter
from tf_syncdist.strategies.learner_runs import Step
from tf_syncdist.strategies.replays import Updates
from tf_syncdist.transport.states import Spec


class MixedVariables:
    """What is mixed of one training function: what it trains, and batch statistics.

    It may outlive the function, and does not keep its variables.

    Args:
        step: The function.

    Attributes:
        specs: Name, dtype on the wire and shape of each.
    """

    def __init__(self, step: Step) -> None:
        common = [*step.trained, *step.statistics]
        names = _names(step.updates)
        self.specs: list[Spec] = [
            (
                names.get(id(v), v.name.split(":")[0]),
                wire_dtype(v).name,
                tuple(v.shape.as_list()),
            )
            for v in common
        ]
        self._refs = [weakref.ref(v) for v in common]
        self._own_refs = [weakref.ref(v) for v in step.learner(0, common)]

    @property
    def is_alive(self) -> bool:
        """Whether the variables are still there."""
        return all(ref() is not None for ref in (*self._refs, *self._own_refs))

    @property
    def own(self) -> list[tf.Variable]:
        """What this worker trains with."""
        return [ref() for ref in self._own_refs]

    def is_like(self, other: "MixedVariables") -> bool:
        """Returns whether it is about the same variables."""
        return [id(v) for v in self._common] == [id(v) for v in other._common]

    def has(self, variable: object) -> bool:
        """Returns whether a variable of the program's is one of them."""
        return any(variable is v for v in self._common)

    @property
    def _common(self) -> list[tf.Variable]:
        return [ref() for ref in self._refs]

    def read_own(self) -> list[np.ndarray]:
        """Returns the values with which this worker trains, as flat arrays."""
        return [_flat(v) for v in self.own]

    def read_common(self) -> list[np.ndarray]:
        """Returns the values that everything outside of training sees, as flat arrays."""
        return [_flat(adapter.components(v)[0]) for v in self._common]

    def assign(self, values: Sequence[np.ndarray], own: bool) -> None:
        """Writes what everything outside of training sees, and what this worker trains with.

        Args:
            values: Flat arrays.
            own: Whether this worker goes on from them, too.
        """
        for variable, copy, value in zip(self._common, self.own, values, strict=True):
            shaped = tf.cast(value.reshape(variable.shape), variable.dtype)
            # A component says nothing to those who watch what the program writes.
            adapter.components(variable)[0].assign(shaped)
            if own:
                copy.assign(shaped)


def wire_dtype(variable: tf.Variable) -> tf.DType:
    """Returns as what a variable travels."""
    return tf.float64 if variable.dtype == tf.float64 else tf.float32


def _flat(variable: tf.Variable) -> np.ndarray:
    return tf.cast(variable.read_value(), wire_dtype(variable)).numpy().reshape(-1)


def _names(updates: Updates) -> dict[int, str]:
    """Returns Keras' names of its own, such as "sequential/dense/kernel"."""
    return {id(v.value): v.path for optimizer, _ in updates for v in adapter.trained_by(optimizer)}
