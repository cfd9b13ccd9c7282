"""What an adaptive policy is told of the rounds that are over, and what it plans for the next."""

from typing import NamedTuple, Protocol

import numpy as np


class RoundTimes(NamedTuple):
    """How long each worker took for one round.

    A round *opens* when the one before is closed or, if all workers begin later, with the first of
    them: time that everybody spends elsewhere, in an evaluation for instance, does not count.

    Args:
        run: The run that the round is of.
        seconds: float64, [num_workers]. Seconds from the opening until all values of the worker had
            arrived; NaN where they had not when the round was over.
        closed_seconds: Seconds from the opening until the round was closed. A worker that is
            present and has no time of its own needed more than this.
        present: bool, [num_workers]. Whether the worker could take part. Nothing is known of the
            time of one that could not.
    """

    run: int
    seconds: np.ndarray
    closed_seconds: float
    present: np.ndarray


class Plan(NamedTuple):
    """What a policy wants of a round before its first contribution has come.

    Args:
        count: With how many contributions the round closes, 1 to workers.
        expected_seconds: When the policy expects that, in seconds from the round's opening; `None`
            if it does not say.
        reason: One clause that tells a human why.
    """

    count: int
    expected_seconds: float | None
    reason: str


class Planner(Protocol):
    """The memory of an adaptive policy. Pure: the same rounds give the same plans."""

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over; rounds come in order."""
        ...

    def plan(self) -> Plan:
        """Returns the plan for the next round."""
        ...
