"""How long a worker has been computing for a round."""

import time
from collections.abc import Callable


class Pace:
    """The begins of runs of which the round is not done yet.

    Args:
        clock: Returns the time in seconds; monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[int, float] = {}

    def begin(self, run: int) -> None:
        """Takes note that the worker begins to compute a run."""
        self._since.setdefault(run, self._clock())

    def elapsed_seconds(self, run: int) -> float:
        """Returns how long it has been computing for the round that a run ends; 0 if it has not."""
        # Values are sent by several threads.
        begun = list(self._since.items())
        since = min((t for r, t in begun if r <= run), default=None)
        return 0.0 if since is None else self._clock() - since

    def forget(self, run: int) -> None:
        """Takes note that the rounds of the runs before one are done."""
        self._since = {r: t for r, t in self._since.items() if r >= run}
