"""Variables that say before they are read or written."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_syncdist.strategies import adapter


class WatchedVariable(adapter.MirroredVariable):
    """A variable that says before it is read or written.

    TensorFlow chooses the class of a strategy's variables from a table of its own, so theirs is
    changed after they are made. A graph that has captured the handle reads without a word.
    """

    def _get(self) -> Any:
        self._tf_syncdist_on_use(self)
        return super()._get()

    def _get_cross_replica(self) -> Any:
        self._tf_syncdist_on_use(self)
        return super()._get_cross_replica()

    def _get_on_device_or_primary(self) -> Any:
        self._tf_syncdist_on_use(self)
        return super()._get_on_device_or_primary()

    @property
    def handle(self) -> Any:
        self._tf_syncdist_on_use(self)
        return super().handle

    def _update(self, *args: Any, **kwargs: Any) -> Any:
        self._tf_syncdist_on_use(self)
        return super()._update(*args, **kwargs)

    def _gather_saveables_for_checkpoint(self) -> Any:
        self._tf_syncdist_on_use(self)
        return super()._gather_saveables_for_checkpoint()

    def _dense_var_to_tensor(
        self, dtype: Any = None, name: Any = None, as_ref: bool = False
    ) -> Any:
        instead = _substitutes.get(id(self))
        if instead is not None:
            return tf.convert_to_tensor(instead, dtype)
        return super()._dense_var_to_tensor(dtype, name, as_ref)

    def value(self) -> Any:
        instead = _substitutes.get(id(self))
        return super().value() if instead is None else instead

    def read_value(self) -> Any:
        instead = _substitutes.get(id(self))
        return super().read_value() if instead is None else instead


def watch(variable: tf.Variable, on_use: Callable[[tf.Variable], None]) -> None:
    """Lets a mirrored variable say before it is read or written; others are left as they are."""
    if type(variable) is adapter.MirroredVariable:
        variable.__class__ = WatchedVariable
        variable._tf_syncdist_on_use = on_use


# What is read in place of a variable, by its identity, while a function is traced.
_substitutes: dict[int, tf.Tensor] = {}


@contextlib.contextmanager
def substituted(variable: tf.Variable, value: tf.Tensor) -> Iterator[None]:
    """Lets a watched variable be read as something else."""
    _substitutes[id(variable)] = value
    try:
        yield
    finally:
        del _substitutes[id(variable)]
