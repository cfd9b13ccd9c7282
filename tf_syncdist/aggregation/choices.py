"""What a cutoff policy has chosen lately, and what it says about it. Pure."""

import collections
import re
from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff import Plan, RoundTimes

_RECENT_ROUNDS = 100

# How long a reason that has been said before is not said again.
_AGAIN_SECONDS = 60.0


class Choice(NamedTuple):
    """How a round was closed.

    Args:
        count: With how many contributions.
        closed_seconds: How long after its opening.
        expected_seconds: How long the policy expected that to be; NaN if it has not said.
    """

    count: int
    closed_seconds: float
    expected_seconds: float


class Choices:
    """The rounds that were closed lately."""

    def __init__(self) -> None:
        self._recent: collections.deque[Choice] = collections.deque(maxlen=_RECENT_ROUNDS)
        self.reason = ""

    def add(self, times: RoundTimes, plan: Plan | None) -> None:
        """Takes note of a round that is over.

        Args:
            times: How long it took.
            plan: The plan by which it was closed.
        """
        # Late ones may have a time, too.
        count = int(np.sum(times.seconds <= times.closed_seconds + 1e-9))
        expected = None if plan is None else plan.expected_seconds
        self._recent.append(
            Choice(count, times.closed_seconds, np.nan if expected is None else expected)
        )
        if plan is not None:
            self.reason = plan.reason

    def recent(self) -> list[Choice]:
        """Returns the last rounds, at most a hundred."""
        return list(self._recent)


class Reasons:
    """Says a reason when it changes, and not with every round.

    Reasons that differ by nothing but numbers are taken for the same.
    """

    def __init__(self) -> None:
        self._last = ""
        self._said: dict[str, float] = {}

    def is_news(self, reason: str, now: float) -> bool:
        """Returns whether a reason is to be said.

        Args:
            reason: The reason.
            now: Time, in seconds.
        """
        kind = re.sub(r"[\d.]+(e[-+]?\d+)?", "#", reason)
        if kind == self._last:
            return False
        self._last = kind
        # Two reasons may take turns.
        if now - self._said.get(kind, -_AGAIN_SECONDS) < _AGAIN_SECONDS:
            return False
        self._said[kind] = now
        return True
