"""tf.functions that are given to `strategy.run`."""

import weakref
from collections.abc import Callable
from typing import Any

from tf_syncdist.strategies import adapter


class Lifted:
    """Puts the run inside of a tf.function that was given as replica function.

    Args:
        run: A strategy's `run`.
    """

    def __init__(self, run: Callable) -> None:
        self._run = run
        self._lifted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __call__(self, fn: Callable) -> Callable:
        """Returns a tf.function in which the Python function of `fn` is run."""
        lifted = self._lifted.get(fn)
        if lifted is None:
            python_function = fn.python_function

            def run(*args: Any, **kwargs: Any) -> Any:
                return self._run(python_function, args, kwargs)

            lifted = self._lifted[fn] = adapter.with_python_function(fn, run)
        return lifted
