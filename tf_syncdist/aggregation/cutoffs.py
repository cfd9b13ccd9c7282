"""A cutoff policy that may fail, and waits that end by themselves. Pure."""

import heapq
import math
from typing import Protocol

from tf_syncdist.cutoff import CutoffPolicy, Decision, FullSync, SliceView


class Cutoff:
    """A job's policy. Where it fails, full sync takes its place for the rest of the job.

    Args:
        policy: The policy.

    Attributes:
        policy: The policy that is asked now.
        failure: What went wrong, in words; empty if nothing has.
    """

    def __init__(self, policy: CutoffPolicy) -> None:
        self.policy = policy
        self.failure = ""

    def decide(self, view: SliceView) -> Decision:
        """Asks the policy."""
        try:
            decision = self.policy.decide(view)
            close, wait_until, *_ = decision
            if close or wait_until is None or view.now < wait_until < math.inf:
                return decision
            raise ValueError(
                f"Expected a time after {view.now} to wait until. Received: {wait_until}."
            )
        except Exception as e:  # noqa: BLE001 - no policy is worth a job
            self.fail("decide", e)
            return self.policy.decide(view)

    def fail(self, what: str, error: Exception) -> None:
        """Lets full sync take over.

        Args:
            what: What the policy was to do.
            error: What came of it.
        """
        if not self.failure:
            name = type(self.policy).__name__
            self.failure = f"{name} could not {what} ({type(error).__name__}: {error})"
            self.policy = FullSync()


class Waiting(Protocol):
    """Something that a policy has not closed yet, and when to ask again."""

    closed: bool
    wait_until: float | None


class Alarms:
    """When to ask a policy again if nothing arrives before."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiting]] = []
        self._number = 0

    def set(self, waiting: Waiting, wait_until: float | None) -> None:
        """Takes note of what a policy has said."""
        if wait_until == waiting.wait_until:
            return
        waiting.wait_until = wait_until
        if wait_until is not None:
            self._number += 1
            heapq.heappush(self._heap, (wait_until, self._number, waiting))

    @property
    def earliest(self) -> float | None:
        """The earliest time at which to ask again; `None` for never."""
        while self._heap:
            wait_until, _, waiting = self._heap[0]
            if not waiting.closed and waiting.wait_until == wait_until:
                return wait_until
            heapq.heappop(self._heap)
        return None
