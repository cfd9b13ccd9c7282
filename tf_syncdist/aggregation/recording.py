"""Writes down how long the workers take for each round."""

import time
from collections.abc import Callable

from tf_syncdist.cutoff import RoundTimes, traces
from tf_syncdist.errors import TraceError

# The file is written anew every time, which takes longer the more rounds there are.
_LEAST_SECONDS = 10.0
_SHARE = 50.0

_MOST_ROUNDS = 100_000
_MOST_BYTES = 256 * 2**20
_BYTES_PER_WORKER = 9


class TraceFile:
    """A trace that is written now and then, so that a crash costs little of it.

    Args:
        path: The file, which is replaced if it exists.
        num_workers: How many workers the job has.
        on_event: Called with one line if it cannot be written.
    """

    def __init__(self, path: str, num_workers: int, on_event: Callable[[str], None]) -> None:
        rounds = min(_MOST_ROUNDS, _MOST_BYTES // (_BYTES_PER_WORKER * num_workers))
        self._recorder = traces.Recorder(num_workers, rounds)
        self._path = path
        self._on_event = on_event
        self._due_at = time.monotonic() + _LEAST_SECONDS
        self._has_news = self._has_failed = False

    def observe(self, times: RoundTimes) -> None:
        """Adds a round."""
        self._recorder.observe(times)
        self._has_news = True

    def save_if_due(self, now: float) -> None:
        """Writes the file if it has not been written for some time."""
        if now >= self._due_at:
            self.save()

    def save(self) -> None:
        """Writes the file."""
        if not self._has_news or not len(self._recorder):
            return
        began = time.monotonic()
        try:
            traces.save(self._path, self._recorder.trace())
            self._has_news = False
        except (OSError, TraceError) as e:
            if not self._has_failed:
                self._on_event(f"the trace of run-times could not be written to {self._path}: {e}")
            self._has_failed = True
        ended = time.monotonic()
        self._due_at = ended + max(_LEAST_SECONDS, _SHARE * (ended - began))
