"""The cutoff policies that users choose from, and how they travel to the service."""

import dataclasses
import json

from tf_syncdist.cutoff.deadline import Deadline
from tf_syncdist.cutoff.decisions import (
    CutoffPolicy,
    Decision,
    FrozenPolicy,
    SliceView,
    close_after,
)
from tf_syncdist.cutoff.elfving import Elfving
from tf_syncdist.cutoff.learned import LearnedCutoff
from tf_syncdist.cutoff.order_statistics import OrderStatistics


@dataclasses.dataclass(frozen=True)
class FullSync(FrozenPolicy):
    """Waits for every worker that is still there: plain synchronous SGD."""

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice once everybody who can still contribute has."""
        return close_after(view.num_workers, view)


@dataclasses.dataclass(frozen=True)
class BackupWorkers(FrozenPolicy):
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

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice with its Nth contribution, or the last that can still come."""
        return close_after(view.num_workers - self.b, view)


_POLICIES = {
    cls.__name__: cls
    for cls in (FullSync, BackupWorkers, Deadline, Elfving, OrderStatistics, LearnedCutoff)
}


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
        return cls.from_config(config)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(
            'Expected a cutoff policy such as {"class_name": "BackupWorkers", "config": {"b": 1}} '
            f"with one of the classes {', '.join(sorted(_POLICIES))}. "
            f"Received: {text[:200]!r} ({type(e).__name__}: {e})."
        ) from e
