"""Starts a child service again when it has died."""

import threading
import time
from collections.abc import Callable

from tf_syncdist.cluster.child import ChildAggregator
from tf_syncdist.errors import SyncDistError

_POLL_SECONDS = 0.2
_PAUSE_SECONDS = 0.1

# A service that dies so often within a minute is not going to live.
_MOST_STARTS = 20
_MINUTE = 60.0


class SupervisedAggregator:
    """A child service that is started again at its address when it dies; `close` ends it.

    Workers connect to the new one by themselves and tell it what they know of the job.

    Args:
        start: Starts a child service.
        on_event: Called with one line, on this object's thread.

    Raises:
        AggregatorUnreachableError: If it does not serve at first.
    """

    def __init__(
        self, start: Callable[[], ChildAggregator], on_event: Callable[[str], None]
    ) -> None:
        self._start = start
        self._on_event = on_event
        self._child = start()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="tf_syncdist_child", daemon=True)
        self._thread.start()

    def __enter__(self) -> "SupervisedAggregator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the service. May be called twice."""
        self._closed.set()
        with self._lock:
            self._child.close()
        self._thread.join(5.0)

    def _watch(self) -> None:
        starts: list[float] = []
        while not self._closed.wait(_POLL_SECONDS):
            code = self._child.ended()
            if not code:
                continue
            starts = [t for t in starts if time.monotonic() - t < _MINUTE]
            if len(starts) >= _MOST_STARTS:
                self._on_event("the aggregation service dies again and again; giving up")
                return
            self._on_event(f"the aggregation service ended with {code}; starting it again")
            with self._lock:
                if self._closed.is_set():
                    return
                self._child.close()
                try:
                    starts.append(time.monotonic())
                    self._child = self._start()
                except (SyncDistError, OSError) as e:
                    self._on_event(f"it did not start: {e}")
            self._closed.wait(_PAUSE_SECONDS)
