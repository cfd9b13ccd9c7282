"""The variables that workers hold alike: which are common already, and which a site adds."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter
from tf_syncdist.strategies import variables as vars_lib
from tf_syncdist.strategies.site import Site
from tf_syncdist.strategies.variables import Spec, VariableRegistry


class CommonState:
    """Implements the controller's `StateStore` for TensorFlow variables.

    Args:
        registry: All variables made under the strategy's scope.
    """

    def __init__(self, registry: VariableRegistry) -> None:
        self._registry = registry
        self._common: list[tf.Variable] = []
        self._names: dict[int, str] = {}
        self._new: list[tf.Variable] = []
        self._accumulators: list[tf.Variable] = []

    def unsynchronised(self, site: Site) -> list[Spec]:
        owned = optimizer_variables(site)
        for optimizer, _ in site.updates:
            for variable in (*optimizer.variables, *adapter.trained_by(optimizer)):
                # Keras' names of its own, such as "sequential/dense/kernel".
                self._names[id(variable.value)] = variable.path
        candidates = self._registry.containers(site.variables)
        self._accumulators = [v for v in self._registry.alive() if vars_lib.is_accumulator(v)]
        known = {id(v) for v in self._common}
        written = self._registry.containers(site.written) if site.written else ()
        chosen = vars_lib.synchronised(candidates, owned, written)
        self._new = [v for v in chosen if id(v) not in known]
        return vars_lib.specs(self._new, self._names)

    def read_new(self) -> list[np.ndarray]:
        return vars_lib.read(self._new)

    def assign_new(self, values: Sequence[np.ndarray]) -> None:
        vars_lib.assign(self._new, values)

    def commit(self) -> None:
        self._common += self._new
        self._new = []

    def specs(self) -> list[Spec]:
        return vars_lib.specs(self._common, self._names)

    def read(self) -> list[np.ndarray]:
        return vars_lib.read(self._common)

    def assign(self, values: Sequence[np.ndarray]) -> None:
        vars_lib.assign(self._common, values)
        # What was accumulated for runs that are skipped belongs to no update any more.
        vars_lib.assign(self._accumulators, [np.zeros(v.shape) for v in self._accumulators])

    def fingerprints(self, leave_out: set[int]) -> list[tuple[str, int]]:
        """Returns names and 64 bits of all common variables but those with these identities."""
        return [
            (name, vars_lib.fingerprint(variable))
            for variable, (name, _, _) in zip(self._common, self.specs(), strict=True)
            if id(variable) not in leave_out
        ]


def optimizer_variables(site: Site) -> list[tf.Variable]:
    """Returns TensorFlow's variables of all optimizers that a site uses."""
    return [v.value for optimizer, _ in site.updates for v in optimizer.variables]
