"""Threads for a gRPC server in a process that does something else.

Those of `concurrent.futures` end before Python calls what is registered with `atexit`. But a worker
that is done, and stays there for the others, has yet to serve its model.
"""

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any


class ServerThreads(concurrent.futures.Executor):
    """Executes calls on daemon threads, which serve until `shutdown` or the end of the process.

    Args:
        count: How many threads there are at most; each begins when it is needed.
        name: What they are called.

    Example:

    >>> with ServerThreads(2, "example") as threads:
    ...     threads.submit(sum, [1, 2]).result()
    3
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future:
        """Executes a call when a thread is free, and returns its future."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("Expected threads that serve. Received: a call after their end.")
            if self._idle:
                self._idle -= 1
            elif len(self._threads) < self._count:
                name = f"{self._name}_{len(self._threads)}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._tasks.put((future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls. May be called twice.

        Args:
            wait: Whether to wait for those that are being executed, 5 s at most for each.
            cancel_futures: Whether those that wait are given up.
        """
        with self._lock:
            self._closed = True
            if cancel_futures:
                self._cancel()
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join(5.0)

    def _cancel(self) -> None:
        while not self._tasks.empty():
            task = self._tasks.get_nowait()
            if task is not None:
                task[0].cancel()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, fn, args, kwargs = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as e:  # noqa: BLE001 - it belongs to whoever waits for it
                    future.set_exception(e)
            # What was handled may be large, and the next task may be long in coming.
            del task, future, fn, args, kwargs
            with self._lock:
                self._idle += 1
