"""When to stop waiting: pure policies that decide how many contributions close a round."""

from tf_syncdist.cutoff.planning import Plan, Planner, RoundTimes
from tf_syncdist.cutoff.policies import (
    BackupWorkers,
    CutoffPolicy,
    Decision,
    FullSync,
    SliceView,
    deserialize,
    serialize,
)

__all__ = [
    "BackupWorkers",
    "CutoffPolicy",
    "Decision",
    "FullSync",
    "Plan",
    "Planner",
    "RoundTimes",
    "SliceView",
    "deserialize",
    "serialize",
]
