"""Gives the random generators of every replica another state, so that dropout differs.

Worker 0's first replica keeps the user's seeds, so its initial weights are plain Keras'.
"""

import hashlib
import weakref
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter
from tf_syncdist.strategies.variables import VariableRegistry, is_random_state


class Seeds:
    """Remembers which generators have got a state of their own.

    Args:
        registry: The variables made under the strategy's scope.
        worker: Index of this worker.
    """

    def __init__(self, registry: VariableRegistry, worker: int) -> None:
        self._registry = registry
        self._worker = worker
        self._outside: list[tf.Variable] = []
        self._folded: dict[int, tuple[weakref.ref, int]] = {}

    def fold(self, used: Iterable[tf.Variable] = ()) -> None:
        """Changes the states of generators that are new, or were loaded from a file since.

        Args:
            used: What a training run uses; it may be made outside of the scope.
        """
        self._outside += [
            v
            for v in used
            if is_random_state(v)
            and not self._registry.knows(v)
            and all(v is not o for o in self._outside)
        ]
        with tf.init_scope():
            for variable in (*self._registry.alive(), *self._outside):
                if is_random_state(variable):
                    self._fold(adapter.components(variable))

    def _fold(self, copies: tuple[tf.Variable, ...]) -> None:
        for number, copy in enumerate(copies):
            replica = self._worker * len(copies) + number
            ref, first = self._folded.get(id(copy), (lambda: None, None))
            state = copy.numpy()
            # Keras' generators count in the rest of the state and keep the first number.
            if replica and (ref() is not copy or first != state[0]):
                copy.assign(other_state(state, replica))
                self._folded[id(copy)] = (weakref.ref(copy), int(copy.numpy()[0]))


def other_state(state: np.ndarray, replica: int) -> np.ndarray:
    """Returns the state of a random generator with which a replica draws other numbers."""
    digest = hashlib.blake2b(f"{state.tolist()} {replica}".encode(), digest_size=4).digest()
    changed = state.copy()
    changed[0] = int.from_bytes(digest, "little") >> 1
    return changed
