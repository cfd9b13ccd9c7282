"""The cutoff by time: whoever is in when it is up makes the update."""

import dataclasses
import math

from tf_syncdist.cutoff.decisions import (
    Decision,
    FrozenPolicy,
    SliceView,
    check_min_fraction,
    check_number,
    least_count,
)


@dataclasses.dataclass(frozen=True)
class Deadline(FrozenPolicy):
    """Closes a round some time after its first contribution, with all that are in by then.

    Args:
        seconds: How long a round waits after the first contribution to it, above 0. Take the time
            by which the slower one of two usual workers is behind; raise it if the report counts
            workers as late that should not be.
        min_fraction: With fewer than this fraction of the workers no round closes, however long
            that takes; above 0 and at most 1. Default 0.5. Lower it if more than half of the
            workers may be slow at the same time.

    Raises:
        ValueError: If an argument is no such number.

    Example:

    >>> from tf_syncdist.cutoff import Deadline, SliceView
    >>> policy = Deadline(seconds=0.5)
    >>> view = SliceView(now=7.2, opened_at=7.0, contributions=3, possible=4, num_workers=4)
    >>> close, wait_until, reason, _ = policy.decide(view)
    >>> close, wait_until, reason
    (False, 7.5, '3 of 4 contributions, and 0.3 s are left')
    >>> policy.decide(view._replace(now=7.5)).reason
    'the 0.5 s are over with 3 of 4'
    """

    seconds: float
    min_fraction: float = 0.5

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, 0, math.inf, "a positive number of seconds")
        if math.isinf(self.seconds):
            raise ValueError(
                "Expected `seconds` to be finite. Received: seconds=inf. "
                "Use `FullSync()` to wait for everybody."
            )
        check_min_fraction(self.min_fraction)

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice when the time is up and it has enough, or nobody is left to wait for."""
        there = f"{view.contributions} of {view.num_workers}"
        if view.contributions >= max(1, view.possible):
            return Decision(True, None, f"everybody who can is in: {there}")
        due = view.opened_at + self.seconds
        if view.now < due:
            left = f"{due - view.now:.3g} s are left"
            return Decision(False, due, f"{there} contributions, and {left}")
        least = least_count(self.min_fraction, view.num_workers)
        if view.contributions >= min(least, view.possible):
            return Decision(True, None, f"the {self.seconds:g} s are over with {there}")
        return Decision(False, None, f"the {self.seconds:g} s are over, but {there} are too few")
