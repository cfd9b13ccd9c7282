"""Cutoff policies: small frozen objects that say when a round has waited long enough."""

import dataclasses
import json
from typing import Any, NamedTuple, Protocol

from tf_syncdist.cutoff.planning import Plan, Planner


class SliceView(NamedTuple):
    """What a policy may look at when it decides about one slice of a round.

    Args:
        now: Time of the decision, in seconds of the service's monotonic clock.
        opened_at: When the round began, on the same clock: when the one before was closed or, if
            all that have been heard of began later, when the first of them did. It may yet turn
            out to be earlier.
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
    """

    close: bool
    wait_until: float | None
    reason: str


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


def _first(count: int, view: SliceView) -> Decision:
    needed = max(1, min(count, view.possible))
    if view.contributions >= needed:
        if needed < count:
            return Decision(True, None, f"only {needed} of {count} workers are left to wait for")
        return Decision(True, None, f"the first {needed} of {view.num_workers} are in")
    return Decision(False, None, f"{view.contributions} of {needed} contributions")


@dataclasses.dataclass(frozen=True)
class FullSync:
    """Waits for every worker that is still there: plain synchronous SGD."""

    def replicas_to_aggregate(self, num_workers: int) -> int:
        """Returns N, here all workers."""
        return num_workers

    def planner(self, num_workers: int) -> None:
        """Returns `None`: nothing is to be planned."""

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice once everybody who can still contribute has."""
        return _first(view.num_workers, view)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate the policy: none."""
        return {}


@dataclasses.dataclass(frozen=True)
class BackupWorkers:
    """Closes a round with the first N of N + b contributions and drops the late ones.

    Args:
        b: Number of backup workers, 0 to workers - 1. Raise it if the report shows that one
            worker after another arrives late; each backup worker's computation is spent for
            nothing in the rounds in which it is not needed.

    Raises:
        ValueError: If `b` is negative or no integer.

    References:
        Chen, Pan, Monga, Bengio, Jozefowicz: Revisiting Distributed Synchronous SGD,
        arXiv 1604.00981, algorithm for Sync-Opt.
    """

    b: int

    def __post_init__(self) -> None:
        if isinstance(self.b, bool) or not isinstance(self.b, int) or self.b < 0:
            raise ValueError(
                "`backup_workers` must be an integer of at least 0. "
                f"Received: backup_workers={self.b!r} (of type {type(self.b).__name__}). "
                "Use 0 for plain synchronous SGD."
            )

    def replicas_to_aggregate(self, num_workers: int) -> int:
        """Returns N = workers - b."""
        if self.b >= num_workers:
            raise ValueError(
                "`backup_workers` must be smaller than the number of workers, because the first "
                "N = workers - backup_workers contributions make an update. "
                f"Received: backup_workers={self.b} with {num_workers} worker(s). "
                f"Use at most {num_workers - 1}, or start more workers."
            )
        return num_workers - self.b

    def planner(self, num_workers: int) -> None:
        """Returns `None`: nothing is to be planned."""

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice with its Nth contribution, or the last that can still come."""
        return _first(view.num_workers - self.b, view)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate the policy."""
        return {"b": self.b}


_POLICIES = {cls.__name__: cls for cls in (FullSync, BackupWorkers)}


def serialize(policy: CutoffPolicy) -> str:
    """Returns a policy as the JSON in which it travels to the service."""
    name = type(policy).__name__
    if _POLICIES.get(name) is not type(policy):
        raise ValueError(
            f"Expected a cutoff policy of tf_syncdist ({', '.join(sorted(_POLICIES))}), because "
            f"the service evaluates it. Received: cutoff={policy!r} (of type {name})."
        )
    return json.dumps({"class_name": name, "config": policy.get_config()}, sort_keys=True)


def deserialize(text: str) -> CutoffPolicy:
    """Returns the policy that `serialize` wrote; only known classes are built."""
    try:
        data = json.loads(text)
        cls, config = _POLICIES[data["class_name"]], data["config"]
        return cls(**config)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(
            'Expected a cutoff policy such as {"class_name": "BackupWorkers", "config": {"b": 1}} '
            f"with one of the classes {', '.join(sorted(_POLICIES))}. "
            f"Received: {text[:200]!r} ({type(e).__name__}: {e})."
        ) from e
