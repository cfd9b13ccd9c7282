"""The state that workers whose models are mixed have in common."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter
from tf_syncdist.strategies import variables as vars_lib
from tf_syncdist.strategies.learners import Learners
from tf_syncdist.strategies.site import Site
from tf_syncdist.strategies.state import CommonState, optimizer_variables
from tf_syncdist.strategies.untraced import untraced
from tf_syncdist.strategies.variables import Spec, VariableRegistry


class MixingState(CommonState):
    """The central model, and what goes with it.

    Workers begin with all of worker 0's variables. What optimizers hold differs from then on; a
    worker that takes over a state takes over the giver's first learner's.

    Args:
        registry: All variables made under the strategy's scope.
        learners: The learners of this worker.
    """

    def __init__(self, registry: VariableRegistry, learners: Learners) -> None:
        super().__init__(registry)
        self._learners = learners
        self._owned: set[int] = set()

    def unsynchronised(self, site: Site) -> list[Spec]:
        self._owned |= {id(v) for v in optimizer_variables(site)}
        # The optimizer that scales a loss is not seen, but the one within it.
        used = self._registry.containers(site.variables)
        self._owned |= {id(v) for v in used if vars_lib.is_loss_scale(v)}
        return super().unsynchronised(site)

    def assign_new(self, values: Sequence[np.ndarray]) -> None:
        new = self._new
        super().assign_new(values)
        # Learners of another model, which is not new, stay where they are.
        self._learners.restart(new)

    def assign(self, values: Sequence[np.ndarray]) -> None:
        super().assign(values)
        self._learners.restart()

    def fingerprints(self, leave_out: set[int]) -> list[tuple[str, int]]:
        return super().fingerprints(leave_out | self._owned)


class MadeVariables:
    """Variables that a strategy makes for something of the program's, one for each.

    They are made under the strategy's scope, so that a worker that joins takes them over too.

    Args:
        scope: Opens the strategy's scope.
        name: What they are.
    """

    def __init__(self, scope: Callable[[], AbstractContextManager], name: str) -> None:
        self._scope = scope
        self._name = name
        self._made: dict[int, tuple[weakref.ref, tf.Variable]] = {}

    def of(
        self, owner: object, shape: Sequence[int] = (), dtype: tf.DType = tf.float32
    ) -> tf.Variable:
        """Returns the variable for an owner; it is zero at first."""
        found = self.known_of(owner)
        if found is not None:
            return found
        self._made = {k: m for k, m in self._made.items() if m[0]() is not None}

        def make() -> tf.Variable:
            with self._scope():
                return tf.Variable(tf.zeros(shape, dtype), trainable=False, name=self._name)

        made = untraced(make)
        self._made[id(owner)] = (weakref.ref(owner), made)
        return adapter.components(made)[0]

    def known_of(self, owner: object) -> tf.Variable | None:
        """Returns the variable for an owner if there is one."""
        ref, made = self._made.get(id(owner), (lambda: None, None))
        return adapter.components(made)[0] if ref() is owner else None

    def all(self) -> list[tf.Variable]:
        """Returns all of them, distributed as they were made."""
        return [made for _, made in self._made.values()]
