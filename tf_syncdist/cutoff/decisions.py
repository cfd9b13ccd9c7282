"""What every cutoff policy is asked, and what it answers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from tf_syncdist.cutoff.planning import Plan, Planner


class SliceView(NamedTuple):
    """What a policy may look at when it decides about one slice of a round.

    Args:
        now: Time of the decision, in seconds of the service's monotonic clock.
        opened_at: Time of the round's first arrival, on the same clock.
        contributions: How many contributions the slice has.
        possible: How many it can have at most, now that some workers may have left.
        num_workers: How many workers the job was started with.
        plan: What the policy's planner has planned for the round; `None` if it has none, or as long
            as it has not.
    """

    now: float
    opened_at: float
    contributions: int
    possible: int
    num_workers: int
    plan: Plan | None = None


class Decision(NamedTuple):
    """A policy's answer.

    Args:
        close: Whether the slice closes now, with what it has.
        wait_until: When to ask again if nothing arrives before; `None` for never.
        reason: One clause that tells a human why.
        ask_at: With how many contributions to ask again, if neither the plan nor how many are
            possible changes before; `None` for one more.
    """

    close: bool
    wait_until: float | None
    reason: str
    ask_at: int | None = None


class CutoffPolicy(Protocol):
    """What the service needs of a policy."""

    def replicas_to_aggregate(self, num_workers: int) -> int:
        """Returns N, the number of contributions by which `all_reduce(SUM)` is scaled."""
        ...

    def planner(self, num_workers: int) -> Planner | None:
        """Returns a new memory of rounds that are over; `None` if the policy needs none."""
        ...

    def decide(self, view: SliceView) -> Decision:
        """Decides whether a slice closes."""
        ...

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate the policy."""
        ...


class FrozenPolicy:
    """What policies have in common that are frozen dataclasses."""

    def replicas_to_aggregate(self, num_workers: int) -> int:
        """Returns N, here all workers."""
        return num_workers

    def planner(self, num_workers: int) -> Planner | None:
        """Returns a new memory of rounds that are over; here `None`, as nothing is planned."""
        return None

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate the policy."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """Returns the policy whose `get_config` gave this.

        Args:
            config: The arguments by name.
        """
        return cls(**config)


def close_after(count: int, view: SliceView) -> Decision:
    """Closes a slice with so many contributions, or with the last that can still come.

    Args:
        count: How many, 1 to workers.
        view: The slice.
    """
    needed = min(count, view.possible)
    if view.contributions < needed or not view.contributions:
        return Decision(False, None, f"{view.contributions} of {needed} contributions", needed)
    if needed < count:
        return Decision(True, None, f"only {needed} of {count} workers are left to wait for")
    return Decision(True, None, f"the first {needed} of {view.num_workers} are in")


def close_as_planned(view: SliceView, min_fraction: float) -> Decision:
    """Closes a slice with as many contributions as are planned for the round.

    As long as nothing is planned, with all that can come.

    Args:
        view: The slice.
        min_fraction: No fewer than this fraction of the workers, whatever the plan is.
    """
    plan = view.plan
    if plan is None:
        decision = close_after(view.num_workers, view)
        return decision._replace(reason=f"{decision.reason}; nothing is planned yet")
    decision = close_after(max(plan.count, least_count(min_fraction, view.num_workers)), view)
    if not decision.close:
        return decision
    expected = "" if plan.expected_seconds is None else f" in {plan.expected_seconds:.3g} s"
    return Decision(True, None, f"{decision.reason}; planned {plan.count}{expected}: {plan.reason}")


def least_count(min_fraction: float, num_workers: int) -> int:
    """Returns how many workers a fraction of them is, at least one.

    Args:
        min_fraction: The fraction, above 0 and at most 1.
        num_workers: How many workers there are.
    """
    # A third of three workers is one, although 3 * (1 / 3) may be computed as a little more.
    return max(1, math.ceil(min_fraction * num_workers - 1e-9))


def check_number(name: str, value: Any, least: float, most: float, what: str) -> None:
    """Checks that an argument of a policy is a number of a range.

    Args:
        name: Its name.
        value: What the user has given.
        least: It must exceed this,
        most: and be no more than this.
        what: What it is, with its range, for the message.

    Raises:
        ValueError: If it is not.
    """
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not least < value <= most:
        raise ValueError(
            f"Expected `{name}` to be {what}. "
            f"Received: {name}={value!r} (of type {type(value).__name__})."
        )


def check_window(window: Any) -> None:
    """Checks a number of rounds that a policy remembers.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            "Expected `window` to be a number of rounds, an integer of at least 1. "
            f"Received: window={window!r} (of type {type(window).__name__})."
        )


def check_min_fraction(min_fraction: Any) -> None:
    """Checks a lower bound on the fraction of the workers that a round must wait for.

    Raises:
        ValueError: If it is not a number above 0 and at most 1.
    """
    check_number("min_fraction", min_fraction, 0, 1, "a fraction of the workers, in (0, 1]")
