"""What is known of one place in a program where training runs happen."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_syncdist.strategies import adapter
from tf_syncdist.strategies.deferred_updates import DeferredUpdate
from tf_syncdist.strategies.replays import Updates


class Site:
    """One place in a program where training runs happen: one trace of one replica function.

    Attributes:
        outputs: What the last computed run returned.
        unlike_replay: Why applying stored results through the optimizers is not all that the
            function does; empty if it is.
        variables: Variables that it uses; `None` if that is unknown.
        written: Those of them that it writes; `None` if that is unknown.
        exchanges: For each exchange, in which conditions and loops it is.
        tables: For each exchange, which of its values are given as some rows.
        replayed_exchanges: The same of a replay.
        shared_updates: Traced updates, which the computed run and its replay have in common.
        updates: Optimizers in their order, with the variables that each of them updates.
        deferral: Its update, if that is made in the next run.
    """

    def __init__(self, is_probe: bool = False) -> None:
        self.is_probe = is_probe
        self.eager_outputs: Any = None
        self.outputs: list[np.ndarray] | None = None
        self.unlike_replay = ""
        self.synchronised = False
        self.variables: list[tf.Variable] | None = None
        self.written: list[tf.Variable] | None = None
        self.deferral: DeferredUpdate | None = None
        self.reset()

    @property
    def num_deferred_slices(self) -> int:
        """How many slices there are if the update is made in the next run; 0 if it is not."""
        return 0 if self.deferral is None else len(self.deferral.way.slices)

    def defers_update_of(self, variable: int) -> bool:
        """Returns whether a variable, by its identity, is updated in the next run."""
        return self.deferral.defers_update_of(variable)

    def apply_pending(self, arrays: Sequence[np.ndarray], settings: Sequence[np.ndarray]) -> None:
        """Makes the update outside of a run."""
        self.deferral.apply_pending(arrays, settings)

    @property
    def replayable(self) -> bool:
        """Whether a replay has the same lasting effects as the function."""
        return not self.unlike_replay

    def reset(self) -> None:
        """Forgets what was found; TensorFlow traces again when variables were created."""
        self.exchanges: list[tuple[str, ...]] = []
        self.tables: list[list[bool]] = []
        self.replayed_exchanges: list[tuple[str, ...]] = []
        self.updates: Updates = []
        self.scalers: dict[int, object] = {}
        self.shared_updates: dict[tuple[int, ...], Callable] = {}
        if self.deferral is not None:
            self.deferral.begin_trace()
        self._begin(replaying=False)

    def name_of(self, exchange: int, tensor: int) -> str:
        """Returns the name of the variable that a tensor of an exchange is for, if known."""
        exchanges_each = 2 if self.scalers else 1
        regular = len(self.exchanges) == exchanges_each * len(self.updates)
        if not regular or exchange // exchanges_each >= len(self.updates):
            return ""
        optimizer, variables = self.updates[exchange // exchanges_each]
        if tensor >= len(variables):
            return ""
        by_value = {id(v.value): v.path for v in adapter.trained_by(optimizer)}
        return by_value.get(id(variables[tensor]), "")

    def begin_replay(self) -> None:
        """Takes note that exchanges from now on are those of a replay."""
        self.replayed_exchanges = []
        self._begin(replaying=True)

    def _begin(self, replaying: bool) -> None:
        self.root = tf.compat.v1.get_default_graph()
        self.last_exchange: tf.Operation | None = None
        self.num_updates = 0
        self.replaying = replaying
