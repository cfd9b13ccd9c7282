"""Sleeping for layers as if they computed one after the other, and keeping to a schedule."""

from __future__ import annotations

import time
from collections.abc import Callable

# Work that begins so soon after what it waited for is taken to have begun at once.
OVERHEAD_SECONDS = 0.002

# Fewer have no median that is worth anything.
LEAST_STEPS = 3


class Clock:
    """Sleeps for the layers of a step.

    Waking up takes some tens of microseconds, a layer of ResNet-50 perhaps less than a millisecond.
    So a layer ends its share after the one before it *should* have ended, and the small errors do
    not add up. Where a layer begins more than 2 ms late it has waited for something, and its time
    counts from now.

    Args:
        now: Returns the time in seconds; monotonic.
        sleep: Sleeps for so many seconds.

    Attributes:
        spans: When the first layer of each step began, and when its last one ended.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.spans: list[tuple[float, float]] = []
        self._now = now
        self._sleep = sleep
        self._due = 0.0
        self._began_at = 0.0

    def work(self, seconds: float, is_first: bool = False, is_last: bool = False) -> None:
        """Returns when a layer's share of the computing is over.

        Args:
            seconds: Its share.
            is_first: Whether it is the first one of a step.
            is_last: Whether it is the last one.
        """
        now = self._now()
        if is_first:
            self._began_at = now
        self._due = (now if now - self._due > OVERHEAD_SECONDS else self._due) + seconds
        if self._due > now:
            self._sleep(self._due - now)
        if is_last:
            self.spans.append((self._began_at, self._now()))


class Schedule:
    """Tells how many steps there is time for.

    Args:
        cases: How many cases are to be measured.
        steps: How many steps each of them is to have.
        budget_seconds: When the last one should be over; 0 is never. While the cases are later than
            that, they have 3 steps.
        now: Returns the time in seconds; monotonic.
    """

    def __init__(
        self,
        cases: int,
        steps: int,
        budget_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cases = cases
        self._steps = steps
        self._budget_seconds = budget_seconds
        self._now = now
        self._began_at = now()
        self._begun = 0

    def next_steps(self) -> int:
        """Returns how many steps the next case is measured for, and counts it as begun."""
        self._begun += 1
        if not self._budget_seconds:
            return self._steps
        # By the end of the case, as the first one begins with a start of processes.
        due = self._budget_seconds * self._begun / self._cases
        late = self._now() - self._began_at > due
        return min(LEAST_STEPS, self._steps) if late else self._steps
