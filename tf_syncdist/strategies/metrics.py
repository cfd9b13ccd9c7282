"""Epoch exchanges: metrics are summed over workers when they are first read after training runs."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tf_syncdist.propagation.slices import layout_of
from tf_syncdist.strategies import adapter
from tf_syncdist.transport.session import Session


class EpochMetrics:
    """Keeps what was exchanged, and exchanges when something was trained since.

    Args:
        session: The connection to the service.
        run: Returns how many runs this worker has done.
    """

    def __init__(self, session: Session, run: Callable[[], int]) -> None:
        self._session = session
        self._run = run
        self._trained: dict[int, tf.Variable] = {}
        self._exchanged_at = 0
        # For every variable: the sum over workers, and what this worker's copies held then.
        self._sums: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}

    def on_begin(self) -> None:
        """A training run begins: what was exchanged is no longer the state of the metrics."""
        self._sums.clear()

    def add(self, variables: list[tf.Variable]) -> None:
        """Takes note of metric variables that training runs write."""
        for variable in variables:
            self._trained.setdefault(id(variable), variable)

    def forget_sums(self) -> None:
        """An evaluation begins: from here on metrics are this worker's own."""
        self._sums.clear()

    def read(self, variable: tf.Variable, may_exchange: bool) -> tf.Tensor | None:
        """Returns a variable's value over all workers.

        Args:
            variable: A variable that is synchronised on read.
            may_exchange: Whether an exchange may happen now; it may not during an evaluation.

        Returns:
            The value, or `None` if this worker's own value is to be used.
        """
        if id(variable) not in self._trained:
            return None
        if may_exchange and self._run() > self._exchanged_at:
            self._exchange()
        found = self._sums.get(id(variable))
        if found is None:
            return None
        total, held = found
        # A variable that was reset or updated since is this worker's own again.
        if any(not np.array_equal(a, b) for a, b in zip(held, _values(variable), strict=True)):
            return None
        return tf.constant(total, variable.dtype)

    def _exchange(self) -> None:
        variables = list(self._trained.values())
        held = [_values(v) for v in variables]
        vector = [np.sum(h, axis=0, dtype=np.float64).ravel() for h in held]
        # The last element counts the workers, for variables that are averaged.
        mine = np.concatenate([*vector, [len(held[0]) if held else 1.0]])
        layout = layout_of([(v.name, v.shape.as_list(), v.aggregation.name) for v in variables])
        self._exchanged_at = self._run()
        total = self._session.exchange_epoch(self._exchanged_at, layout, mine)
        start = 0
        for variable, copies in zip(variables, held, strict=True):
            size = copies[0].size
            value = total[start : start + size].reshape(copies[0].shape)
            start += size
            if variable.aggregation is tf.VariableAggregation.MEAN:
                value = value / total[-1]
            self._sums[id(variable)] = (value.astype(copies[0].dtype), copies)


def _values(variable: tf.Variable) -> list[np.ndarray]:
    return [c.numpy() for c in adapter.components(variable)]
