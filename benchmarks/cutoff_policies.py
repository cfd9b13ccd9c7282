"""The policies of benchmarks.cutoffs: those of the package, the best in hindsight, and parts."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import numpy as np

from tf_syncdist.cutoff import (
    BackupWorkers,
    CutoffPolicy,
    Deadline,
    Decision,
    Elfving,
    FullSync,
    OrderStatistics,
    Plan,
    Planner,
    RoundTimes,
    SliceView,
    models,
)
from tf_syncdist.cutoff.decisions import FrozenPolicy, close_as_planned, least_count
from tf_syncdist.cutoff.learned import LearnedCutoff
from tf_syncdist.cutoff.markov import Markov
from tf_syncdist.cutoff.network import Network
from tf_syncdist.cutoff.order_statistics import best_count
from tf_syncdist.cutoff.predictors import Predictor, expected_order
from tf_syncdist.cutoff.smoothing import Smoother
from tf_syncdist.simulation.comparison import sweep

_MIN_FRACTION = 0.25
# As LearnedCutoff does with a new model.
_FIRST_ROUNDS = 20
_DEADLINES = 60


@dataclasses.dataclass(frozen=True)
class Alone(FrozenPolicy):
    """Follows one of the predictors of `LearnedCutoff`, whatever becomes of it.

    Args:
        predictor: "network", "chains" or "smoother".
        model: The file of the model.
    """

    predictor: str
    model: str | None = None

    def planner(self, num_workers: int) -> AlonePlanner:
        """Returns a new memory."""
        if self.predictor == "smoother":
            return AlonePlanner(Smoother(num_workers, 0), num_workers)
        model = models.load(self.model)
        network = self.predictor == "network"
        predictor = Network(model.weights, 0) if network else Markov(model.chains, 0)
        return AlonePlanner(predictor, num_workers)

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice with as many contributions as are planned."""
        return close_as_planned(view, _MIN_FRACTION)


class AlonePlanner:
    """A predictor, and what it makes plans for.

    Args:
        predictor: The predictor.
        num_workers: How many workers the job has.
    """

    def __init__(self, predictor: Predictor, num_workers: int) -> None:
        self._predictor = predictor
        self._everybody = np.ones(num_workers, bool)
        self._rounds = 0

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over."""
        self._rounds += 1
        self._predictor.observe(times)

    def plan(self) -> Plan:
        """Returns the best plan by the predictor."""
        num_workers = len(self._everybody)
        if self._rounds < _FIRST_ROUNDS:
            return Plan(num_workers, None, "the first rounds")
        order = expected_order(self._predictor.samples(), self._everybody)
        count = best_count(order, least_count(_MIN_FRACTION, num_workers))
        return Plan(count, float(order[count - 1]), "predicted")


class Timed:
    """A policy that behaves like another one and takes the time of its plans.

    Args:
        policy: The other one.
    """

    def __init__(self, policy: CutoffPolicy) -> None:
        self._policy = policy
        self._seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    @property
    def decision_seconds(self) -> float:
        """The median time for a round: to take note of the one before and to plan the next."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    def planner(self, num_workers: int) -> Planner | None:
        """Returns a new memory whose plans are timed."""
        planner = self._policy.planner(num_workers)
        return None if planner is None else _TimedPlanner(planner, self._seconds)


class _TimedPlanner:
    def __init__(self, planner: Planner, seconds: list[float]) -> None:
        self._planner = planner
        self._all = seconds
        self._observing = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round."""
        since = time.perf_counter()
        self._planner.observe(times)
        self._observing = time.perf_counter() - since

    def plan(self) -> Plan:
        """Returns the plan for the next round."""
        since = time.perf_counter()
        plan = self._planner.plan()
        self._all.append(time.perf_counter() - since + self._observing)
        return plan


def policies(
    seconds: np.ndarray, model: str | None, busy: bool, first_round: int
) -> dict[str, CutoffPolicy]:
    """Returns all policies by name.

    Args:
        seconds: The run-times; those that are the best in hindsight see them.
        model: The file of a model for the learned ones; `None` leaves them out.
        busy: Whether late workers stay busy.
        first_round: From which round on is measured.
    """
    num_workers = seconds.shape[1]
    measured = seconds[first_round:]
    few = max(1, round(0.04 * num_workers))
    found: dict[str, CutoffPolicy] = {
        "full": FullSync(),
        f"backup:{few}": BackupWorkers(few),
        "backup:best": BackupWorkers(sweep(measured, busy, most=16).best),
        "deadline:best": best_deadline(measured),
        "elfving": Elfving(),
        "order_statistics": OrderStatistics(),
        "learned:smoother": Alone("smoother"),
    }
    if model is not None:
        found["learned:chains"] = Alone("chains", model)
        found["learned:network"] = Alone("network", model)
        found["learned"] = LearnedCutoff(model)
    return found


def best_deadline(seconds: np.ndarray) -> Deadline:
    """Returns the best deadline in hindsight, where late workers begin with the others.

    Args:
        seconds: float64, [rounds, num_workers].
    """
    order = np.sort(seconds, axis=1)
    behind = order - order[:, :1]
    least = least_count(Deadline(1.0).min_fraction, order.shape[1])
    best, most = None, 0.0
    # How far workers are behind the first one is all that makes a difference.
    for value in np.quantile(behind[:, 1:], np.linspace(0.3, 1, _DEADLINES)):
        counts = np.maximum((behind <= value).sum(axis=1), least)
        everybody = counts == order.shape[1]
        late = np.maximum(order[:, 0] + value, order[:, least - 1])
        throughput = counts.sum() / np.where(everybody, order[:, -1], late).sum()
        if throughput > most:
            best, most = Deadline(float(value)), throughput
    assert best is not None
    return best
