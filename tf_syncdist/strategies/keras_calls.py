"""Tells the strategy which Keras method is calling it, by wrapping Model.fit, evaluate and predict.

Keras gives a strategy no way to know: fit, evaluate and predict distribute their input by the same
call, and each process prints a progress bar of its own.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf


class KerasCall:
    """A call of fit, evaluate or predict that is in progress.

    Args:
        method: "fit", "evaluate" or "predict".
        batch_size: What the user passed, or Keras' default; `None` if the input is batched.
    """

    def __init__(self, method: str, batch_size: int | None) -> None:
        self.method = method
        self.batch_size = batch_size
        self.has_input = False

    @property
    def takes_training_input(self) -> bool:
        """Whether the next input to be distributed is that of training; true once per fit."""
        if self.method != "fit" or self.has_input:
            return False
        self.has_input = True
        return True


_current: contextvars.ContextVar[KerasCall | None] = contextvars.ContextVar(
    "tf_syncdist_keras_call", default=None
)


def current() -> KerasCall | None:
    """Returns the innermost Keras call in progress."""
    return _current.get()


def install() -> None:
    """Wraps Keras' methods, once. Models without one of our strategies see no difference."""
    for method in ("fit", "evaluate", "predict"):
        original = getattr(keras.Model, method)
        if not hasattr(original, "_tf_syncdist"):
            wrapped = _wrap(original, method)
            wrapped._tf_syncdist = True
            setattr(keras.Model, method, wrapped)


def _wrap(original: Callable, method: str) -> Callable:
    @functools.wraps(original)
    def call(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        strategy = getattr(self, "distribute_strategy", None)
        handler = getattr(strategy, "_keras_call", None)
        if handler is None:
            return original(self, *args, **kwargs)
        with handler(self, method, args, kwargs):
            return original(self, *args, **kwargs)

    return call


@contextlib.contextmanager
def calling(method: str, args: tuple, kwargs: dict, quiet: bool) -> Iterator[KerasCall]:
    """Marks a Keras call as the one in progress.

    Args:
        method: The method.
        args: Its positional arguments after `self`.
        kwargs: Its keyword arguments; `verbose` is turned off here if `quiet` and not given.
        quiet: Whether this worker prints no progress bar.
    """
    positions = {"fit": (2, 4), "evaluate": (2, 3), "predict": (1, 2)}[method]
    batch_size = args[positions[0]] if len(args) > positions[0] else kwargs.get("batch_size")
    given = len(args) > positions[1] or kwargs.get("verbose", "auto") != "auto"
    if quiet and not given:
        kwargs["verbose"] = 0
    data = args[0] if args else kwargs.get("x")
    token = _current.set(KerasCall(method, (batch_size or 32) if _is_arrays(data) else None))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def _is_arrays(data: Any) -> bool:
    leaves = tf.nest.flatten(data)
    return bool(leaves) and all(hasattr(v, "shape") and hasattr(v, "dtype") for v in leaves)
