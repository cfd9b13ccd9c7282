"""Variables that say before they are read or written."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_syncdist.strategies import adapter


class WatchedVariable(adapter.MirroredVariable):
    """A variable that says before it is read or written, and after it was written.

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
        found = super()._update(*args, **kwargs)
        self._tf_syncdist_on_write(self, found)
        return found

    def _gather_saveables_for_checkpoint(self) -> Any:
        self._tf_syncdist_on_use(self)
        made = super()._gather_saveables_for_checkpoint()
        return {k: functools.partial(_saveable, self, make) for k, make in made.items()}

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


def _saveable(variable: WatchedVariable, make: Callable, *args: Any, **kwargs: Any) -> Any:
    """Returns what saves and restores a variable; a restored value is a written one."""
    saveable = make(*args, **kwargs)
    restore = saveable.restore

    def restored(*values: Any, **options: Any) -> Any:
        found = restore(*values, **options)
        variable._tf_syncdist_on_write(variable, found)
        return found

    saveable.restore = restored
    return saveable


def _nothing(*_: Any) -> None:
    pass


def watch(
    variable: tf.Variable,
    on_use: Callable[[tf.Variable], None],
    on_write: Callable[[tf.Variable, Any], None] = _nothing,
) -> None:
    """Lets a mirrored variable say that it is used; others are left as they are.

    Args:
        variable: The variable.
        on_use: Called with it before it is read or written.
        on_write: Called with it and the operation, or what it returned, after it was written.
    """
    if type(variable) is adapter.MirroredVariable:
        variable.__class__ = WatchedVariable
        variable._tf_syncdist_on_use = on_use
        variable._tf_syncdist_on_write = on_write


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
