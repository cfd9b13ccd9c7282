"""Variables of a strategy: which there are, what they hold, and fingerprints of them."""

import contextlib
import gc
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


def fingerprint(variable: tf.Variable) -> int:
    """Returns 64 bits that differ if the value of a variable does."""
    value = np.ascontiguousarray(_value(variable))
    digest = hashlib.blake2b(value.reshape(-1).view(np.uint8), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


# Names by which Keras' batch normalisation and TensorFlow's and Keras' random generators call what
# they keep.
_BATCH_STATISTICS = {
    "moving_mean",
    "moving_stddev",
    "moving_variance",
    "renorm_mean",
    "renorm_stddev",
}
_RANDOM_STATES = {"StateVar", "seed_generator_state"}


def is_random_state(variable: tf.Variable) -> bool:
    """Returns whether a variable is the state of a random generator."""
    return _last_name(variable) in _RANDOM_STATES


def is_accumulator(variable: tf.Variable) -> bool:
    """Returns whether a variable holds gradients that a Keras optimizer accumulates."""
    return _last_name(variable).endswith("gradient_accumulator")


def is_loss_scale(variable: tf.Variable) -> bool:
    """Returns whether a variable is the scale of a Keras LossScaleOptimizer."""
    return _last_name(variable) == "dynamic_scale" and not variable.trainable


def is_local(variable: tf.Variable) -> bool:
    """Returns whether workers may hold a variable differently while an epoch runs.

    Such are metrics, the statistics of batch normalisation, and the states of random generators.
    """
    return (
        adapter.is_sync_on_read(variable)
        or is_random_state(variable)
        or (_last_name(variable) in _BATCH_STATISTICS and not variable.trainable)
    )


def _last_name(variable: tf.Variable) -> str:
    return variable.name.split(":")[0].rstrip("/").split("/")[-1]


class VariableRegistry:
    """Remembers which variables were made under a strategy's scope.

    It holds them weakly: a model that is deleted frees its memory.
    """

    def __init__(self) -> None:
        self._containers: dict[int, weakref.ref] = {}
        self._has_new = False

    def add(self, variable: tf.Variable) -> None:
        """Takes note of a distributed variable."""
        self._has_new = True
        for component in adapter.components(variable):
            # An identity may come back after its object is gone; order is that of creation.
            self._containers.pop(id(component), None)
            self._containers[id(component)] = weakref.ref(variable)

    def knows(self, variable: tf.Variable) -> bool:
        """Returns whether a variable was made under the scope."""
        return id(adapter.components(variable)[0]) in self._containers

    def check(self, variable: tf.Variable, name: str) -> None:
        """Raises a ValueError if a variable that is trained was made outside of the scope."""
        if not self.knows(variable):
            raise ValueError(
                "Expected the model and its optimizer to be made under the strategy's scope, since "
                f"workers do not hold other variables alike. Received: {name!r}, which was made "
                "outside of it. Build and compile the model within `with strategy.scope():`."
            )

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
            if self._has_new:
                # Variables of a model that is gone live until Python finds them, on each worker
                # for another time.
                gc.collect()
                self._has_new = False
            return self.alive()
        ids = {id(v) for v in captured}
        return [v for v in self.alive() if any(id(c) in ids for c in adapter.components(v))]

    def alive(self) -> list[tf.Variable]:
        """Returns all variables that still exist, in the order of their creation."""
        found = {id(v): v for v in (ref() for ref in self._containers.values()) if v is not None}
        return list(found.values())


def synchronised(
    variables: Iterable[tf.Variable], owned: Sequence[object], written: Sequence[object] = ()
) -> list[tf.Variable]:
    """Chooses the variables that every worker must hold alike.

    Those are floating-point variables that are written alike on all replicas, whatever an optimizer
    owns but for gradients that it accumulates, and counters that training writes. Metrics are local
    until they are read, and the states of random generators stay local.

    Args:
        variables: Distributed variables.
        owned: TensorFlow variables of the optimizers.
        written: Variables that training runs write.
    """
    counted = {id(v) for v in (*owned, *written)}
    return [
        v
        for v in variables
        if not adapter.is_sync_on_read(v)
        and not is_accumulator(v)
        and not is_random_state(v)
        and (v.dtype.is_floating or id(v) in counted)
    ]


def specs(variables: Iterable[tf.Variable], names: dict[int, str]) -> list[Spec]:
    """Returns name, dtype and shape of variables; `names` knows better names by identity."""
    return [
        (names.get(id(v), v.name.split(":")[0]), v.dtype.name, tuple(v.shape.as_list()))
        for v in variables
    ]


def read(variables: Iterable[tf.Variable]) -> list[np.ndarray]:
    """Returns the values of this worker's first copies, which stay as they are.

    Nothing is copied here. TensorFlow copies a variable that is written while its value is held.
    """
    return [_value(v) for v in variables]


def _value(variable: tf.Variable) -> np.ndarray:
    tensor = adapter.components(variable)[0].read_value()
    if tensor.device.endswith("CPU:0"):
        with contextlib.suppress(ValueError):
            # NumPy knows no buffers of bfloat16.
            return np.asarray(memoryview(tensor))
    return tensor.numpy()


def assign(variables: Iterable[tf.Variable], values: Iterable[np.ndarray]) -> None:
    """Writes values into every copy of this worker."""
    for variable, value in zip(variables, values, strict=True):
        for component in adapter.components(variable):
            component.assign(value)
