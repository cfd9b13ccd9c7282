"""Leaves the function that is being traced, and the scopes around it."""

import threading
from collections.abc import Callable
from typing import Any


def untraced(fn: Callable[[], Any]) -> Any:
    """Calls a function as if nothing were being traced, and returns what it returns.

    `tf.init_scope` leaves a graph, but not the scopes in which variables are made: a tf.function
    that is traced a second time refuses variables, and a strategy's scope distributes them. Both
    belong to a thread, so another one is free of them.
    """
    found: list[Any] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(fn())
        except BaseException as e:  # noqa: BLE001 - it is raised where it was called
            failed.append(e)

    thread = threading.Thread(target=call, name="tf_syncdist_untraced", daemon=True)
    thread.start()
    # As if it were called here: it takes as long as it takes.
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
