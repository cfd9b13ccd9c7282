"""Variables of a strategy: which there are, what they hold, and fingerprints of them."""

import hashlib
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter

Spec = tuple[str, str, tuple[int, ...]]


def variables_sha256(variables: Iterable[object]) -> str:
    """Returns a fingerprint of the values of variables.

    Args:
        variables: Keras or TensorFlow variables, such as `model.trainable_variables`. Their order
            matters, their names do not.

    Returns:
        64 hexadecimal digits; equal exactly if dtypes, shapes and all bits of the values are.

    Example:

    >>> import tensorflow as tf
    >>> a, b = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
    >>> variables_sha256([a]) == variables_sha256([b])
    True
    """
    digest = hashlib.sha256()
    for variable in variables:
        value = np.ascontiguousarray(np.asarray(variable.numpy()))
        digest.update(f"{value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


class VariableRegistry:
    """Remembers which variables were made under a strategy's scope.

    It holds them weakly: a model that is deleted frees its memory.
    """

    def __init__(self) -> None:
        self._containers: dict[int, weakref.ref] = {}

    def add(self, variable: tf.Variable) -> None:
        """Takes note of a distributed variable."""
        for component in adapter.components(variable):
            # An identity may come back after its object is gone; order is that of creation.
            self._containers.pop(id(component), None)
            self._containers[id(component)] = weakref.ref(variable)

    def containers(self, captured: Iterable[tf.Variable] | None) -> list[tf.Variable]:
        """Returns the distributed variables that captured ones belong to.

        Args:
            captured: Variables as a graph has captured them, in any order; `None`, without a
                graph, stands for all that there are.

        Returns:
            Distributed variables in the order of their creation, which is the same on every
            worker that runs the same program.
        """
        if captured is None:
            return self.alive()
        ids = {id(v) for v in captured}
        return [v for v in self.alive() if any(id(c) in ids for c in adapter.components(v))]

    def alive(self) -> list[tf.Variable]:
        """Returns all variables that still exist, in the order of their creation."""
        found = {id(v): v for v in (ref() for ref in self._containers.values()) if v is not None}
        return list(found.values())


def synchronised(variables: Iterable[tf.Variable], owned: Sequence[object]) -> list[tf.Variable]:
    """Chooses the variables that every worker must hold alike.

    Those are floating-point variables that are written alike on all replicas, and whatever an
    optimizer owns. Metrics are local until they are read, and integer state (seeds) stays local.

    Args:
        variables: Distributed variables.
        owned: TensorFlow variables of the optimizers.
    """
    owned_ids = {id(v) for v in owned}
    return [
        v
        for v in variables
        if not adapter.is_sync_on_read(v) and (v.dtype.is_floating or id(v) in owned_ids)
    ]


def specs(variables: Iterable[tf.Variable], names: dict[int, str]) -> list[Spec]:
    """Returns name, dtype and shape of variables; `names` knows better names by identity."""
    return [
        (names.get(id(v), v.name.split(":")[0]), v.dtype.name, tuple(v.shape.as_list()))
        for v in variables
    ]


def read(variables: Iterable[tf.Variable]) -> list[np.ndarray]:
    """Returns the values of this worker's first copies."""
    return [adapter.components(v)[0].numpy() for v in variables]


def assign(variables: Iterable[tf.Variable], values: Iterable[np.ndarray]) -> None:
    """Writes values into every copy of this worker."""
    for variable, value in zip(variables, values, strict=True):
        for component in adapter.components(variable):
            component.assign(value)
