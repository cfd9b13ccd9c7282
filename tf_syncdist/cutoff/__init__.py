"""When to stop waiting: pure policies that decide how many contributions close a round."""

from tf_syncdist.cutoff.deadline import Deadline
from tf_syncdist.cutoff.decisions import CutoffPolicy, Decision, SliceView
from tf_syncdist.cutoff.elfving import Elfving
from tf_syncdist.cutoff.learned import LearnedCutoff
from tf_syncdist.cutoff.order_statistics import OrderStatistics
from tf_syncdist.cutoff.planning import Plan, Planner, RoundTimes
from tf_syncdist.cutoff.policies import BackupWorkers, FullSync, deserialize, serialize

__all__ = [
    "BackupWorkers",
    "CutoffPolicy",
    "Deadline",
    "Decision",
    "Elfving",
    "FullSync",
    "LearnedCutoff",
    "OrderStatistics",
    "Plan",
    "Planner",
    "RoundTimes",
    "SliceView",
    "deserialize",
    "serialize",
]
