"""The learned cutoff: each round is closed where most contributions per second are predicted."""

import dataclasses
import os
from typing import Any

import numpy as np

from tf_syncdist.cutoff import models
from tf_syncdist.cutoff.audition import Audition
from tf_syncdist.cutoff.decisions import (
    Decision,
    FrozenPolicy,
    SliceView,
    check_min_fraction,
    close_as_planned,
    least_count,
)
from tf_syncdist.cutoff.experts import Experts
from tf_syncdist.cutoff.markov import Markov
from tf_syncdist.cutoff.models import RunTimeModel
from tf_syncdist.cutoff.network import Network
from tf_syncdist.cutoff.order_statistics import best_count
from tf_syncdist.cutoff.planning import Plan, RoundTimes, TrainingRequest
from tf_syncdist.cutoff.predictors import expected_order
from tf_syncdist.cutoff.smoothing import Smoother
from tf_syncdist.cutoff.traces import Recorder
from tf_syncdist.errors import RunTimeModelError

_NETWORK, _CHAINS, _SMOOTHER = "the network", "the hidden Markov chains", "the smoother"

# Shorter traces than this teach nothing.
LEAST_ROUNDS = 100

# Rounds in which everybody is waited for when a model is new or the cluster has changed, so that
# all workers are known; and how many of the past are shown to a new model.
_FIRST_ROUNDS = 20
_PAST_ROUNDS = 50

# The cluster has changed when the smoother, which has learned nothing, was better than the model by
# so much per worker and round, on average over about so many rounds.
_CHANGE = -0.1
_CHANGE_ROUNDS = 50

_MOST_ROUNDS = 4000


def experts(model: RunTimeModel, seed: int = 0) -> Experts:
    """Returns the predictors of a model, and the smoother, as one.

    Args:
        model: The model.
        seed: Of the draws.
    """
    return Experts(
        {
            _NETWORK: Network(model.weights, seed),
            _CHAINS: Markov(model.chains, seed),
            _SMOOTHER: Smoother(model.num_workers, seed),
        }
    )


@dataclasses.dataclass(frozen=True)
class LearnedCutoff(FrozenPolicy):
    """Closes each round where a model of the workers' run-times expects most per second.

    The model draws all workers' next times jointly; sorted and averaged they are the expected time
    of each arrival, and the round closes with the c-th for which c / E[time] is greatest. The model
    is a deep Markov model, hidden Markov chains, and a smoother that has learned nothing: the one
    is followed that has been right of late.

    Without `model` everybody is waited for in the first `warmup_rounds`, of which a model is then
    trained in a process of its own; it is used if on held-out rounds it is better than the best
    fixed number of workers. Until then the smoother is, under the same condition. When a model is
    worse than the smoother for some fifty rounds, the cluster has changed: everybody is waited for
    in 20 rounds, the better predictor is followed, and another model is trained.

    Workers are told apart by their numbers, so a model is of as many as it was trained with. If the
    job has another number, the policy goes on as if no model was given. Workers that leave or come
    back are taken out of the prediction and in again.

    Args:
        model: A file that `python -m tf_syncdist.train_cutoff` has written; the process of the
            service reads it. Default `None`. Use `LearnedCutoff.load`, which looks into it at once.
        warmup_rounds: How many rounds are learned from if there is no model, at least 100. Default
            500. Raise it to 2,000 if the workers' states last hundreds of rounds.
        min_fraction: No fewer than this fraction of the workers, above 0 and at most 1. Default
            0.25. Raise it if an update of few contributions is not worth having.
        seed: Seed of the training and of all draws, at least 0. Default 0.

    Raises:
        ValueError: If an argument is of another kind.

    Example:

    >>> import numpy as np
    >>> from tf_syncdist.cutoff import LearnedCutoff, RoundTimes
    >>> planner = LearnedCutoff(warmup_rounds=100).planner(num_workers=3)
    >>> planner.observe(RoundTimes(0, np.array([1.0, 1.1, 5.0]), 5.0, np.ones(3, bool)))
    >>> planner.plan().reason
    'everybody is waited for while run-times are recorded'

    References:
        Teng, Wood: High Throughput Synchronous Distributed SGD, arXiv 1803.04209; sections 3 and 4.
    """

    model: str | None = None
    warmup_rounds: int = 500
    min_fraction: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model is not None and (not isinstance(self.model, str) or not self.model):
            raise ValueError(
                "Expected `model` to be the path of a file, or None. "
                f"Received: model={self.model!r} (of type {type(self.model).__name__})."
            )
        _check_integer("warmup_rounds", self.warmup_rounds, LEAST_ROUNDS)
        _check_integer("seed", self.seed, 0)
        check_min_fraction(self.min_fraction)

    @classmethod
    def load(cls, path: str | os.PathLike, **arguments: Any) -> "LearnedCutoff":
        """Returns the policy with a model from a file.

        Args:
            path: What `python -m tf_syncdist.train_cutoff` has written. The first aggregator reads
                it again, so it must find it under the same path.
            **arguments: The other arguments of the policy.

        Raises:
            RunTimeModelError: If the file is missing, damaged, something else or of another
                version.
        """
        models.load(path)
        return cls(os.path.abspath(path), **arguments)

    def planner(self, num_workers: int) -> "LearnedPlanner":
        """Returns a new memory.

        Raises:
            RunTimeModelError: If the file of the model cannot be used.
        """
        model = None if self.model is None else models.load(self.model)
        return LearnedPlanner(self, num_workers, model)

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice with as many contributions as are planned."""
        return close_as_planned(view, self.min_fraction)


class LearnedPlanner:
    """A `LearningPlanner`: predicts, and watches how well it does.

    Args:
        policy: The arguments.
        num_workers: How many workers the job has.
        model: What to begin with; `None` to record and have one trained.
    """

    def __init__(
        self, policy: LearnedCutoff, num_workers: int, model: RunTimeModel | None = None
    ) -> None:
        self._policy = policy
        self._num_workers = num_workers
        self._least = least_count(policy.min_fraction, num_workers)
        self._experts = Experts({_SMOOTHER: Smoother(num_workers, policy.seed)})
        self._audition = Audition(num_workers)
        self._recorder = Recorder(num_workers, max(_MOST_ROUNDS, policy.warmup_rounds))
        self._present = np.ones(num_workers, bool)
        self._has_model = False
        # Rounds until others than all workers may be waited for, and why not before.
        self._full_rounds = policy.warmup_rounds
        self._why_full = "everybody is waited for while run-times are recorded"
        # Trainings: rounds until the next, whether one is under way, how many there were.
        self._rounds_to_request = policy.warmup_rounds
        self._is_training = False
        self._requests = 0
        self._watched_rounds = 0
        self._advantage = 0.0
        if model is not None and model.num_workers == num_workers:
            self._use(model, "everybody is waited for in the first rounds")
        elif model is not None:
            self._why_full = (
                f"the model is of {model.num_workers} workers, not {num_workers}; {self._why_full}"
            )

    def observe(self, times: RoundTimes) -> None:
        """Takes note of a round that is over; rounds come in order.

        Raises:
            ValueError: If it is of another number of workers.
        """
        if times.seconds.shape != (self._num_workers,):
            raise ValueError(
                f"Expected the times of {self._num_workers} workers. "
                f"Received: shape {list(times.seconds.shape)}."
            )
        if np.isnan(times.seconds).all():
            return
        if self._full_rounds and not self._has_model and len(self._recorder) >= _FIRST_ROUNDS:
            self._audition.observe(times, self._predicted()[0])
        self._recorder.observe(times)
        self._experts.observe(times)
        self._present = times.present | ~np.isnan(times.seconds)
        self._full_rounds = max(0, self._full_rounds - 1)
        self._rounds_to_request = max(0, self._rounds_to_request - 1)
        if self._has_model:
            self._watch()

    def plan(self) -> Plan:
        """Returns the plan for the next round."""
        if self._full_rounds or not len(self._recorder):
            return Plan(self._num_workers, None, self._why_full)
        if not self._has_model and not self._audition.passed:
            reason = "everybody is waited for, as no prediction was better than a fixed cutoff"
            return Plan(self._num_workers, None, reason)
        count, seconds = self._predicted()
        return Plan(count, seconds, f"predicted by {self._experts.followed}")

    def training_request(self) -> TrainingRequest | None:
        """Returns what is to be trained now, each request once; see `LearningPlanner`."""
        if self._is_training or self._rounds_to_request or (self._has_model and self._watching):
            return None
        self._is_training = True
        self._requests += 1
        seed = self._policy.seed + self._requests - 1
        return TrainingRequest(self._recorder.trace(), seed)

    def accept(self, model: RunTimeModel) -> str:
        """Takes the model that was asked for; see `LearningPlanner`."""
        if model.num_workers != self._num_workers:
            raise RunTimeModelError(
                f"Expected a model of {self._num_workers} workers, because each is learned by its "
                f"number. Received: one of {model.num_workers}. Train one on a trace of this job."
            )
        self._is_training = False
        learned, _, static, count, _ = model.evaluation
        figures = (
            f"on held-out rounds it gives {learned:.4g} contributions per second, "
            f"the best fixed cutoff, {count}, {static:.4g}"
        )
        if learned <= static:
            self._ask_later()
            return f"it is not used: {figures}"
        self._use(model, self._why_full)
        return f"it is used: {figures}"

    def training_failed(self, reason: str) -> None:
        """Takes note that there will be no model; asks again with twice as many rounds."""
        self._is_training = False
        self._ask_later()

    # How.

    @property
    def _watching(self) -> bool:
        """Whether the model is still taken to be right."""
        return self._watched_rounds >= 0

    def _predicted(self) -> tuple[int, float]:
        order = expected_order(self._experts.samples(), self._present)
        if not np.isfinite(order).all():
            raise FloatingPointError(
                "Expected finite predictions of run-times. Received: "
                f"{order[~np.isfinite(order)][0]} from {self._experts.followed}."
            )
        count = best_count(order, self._least)
        return count, float(order[count - 1])

    def _use(self, model: RunTimeModel, why_full: str) -> None:
        self._experts = experts(model, self._policy.seed)
        past = self._recorder.last(_PAST_ROUNDS)
        for times in past:
            self._experts.observe(times)
        self._has_model = True
        self._watched_rounds, self._advantage = 0, 0.0
        self._full_rounds = max(0, _FIRST_ROUNDS - len(past))
        self._why_full = why_full

    def _ask_later(self) -> None:
        self._rounds_to_request = self._policy.warmup_rounds * 2**self._requests

    def _watch(self) -> None:
        """Notices when what has learned nothing predicts better than what was learned."""
        if not self._watching:
            return
        scores = self._experts.last_scores
        advantage = max(scores[_NETWORK], scores[_CHAINS]) - scores[_SMOOTHER]
        self._advantage += (advantage - self._advantage) / _CHANGE_ROUNDS
        self._watched_rounds += 1
        if self._watched_rounds > _CHANGE_ROUNDS and self._advantage < _CHANGE:
            self._watched_rounds = -1
            self._recorder.clear()
            self._full_rounds = _FIRST_ROUNDS
            self._why_full = "the cluster has changed; everybody is waited for in some rounds"
            self._rounds_to_request = self._policy.warmup_rounds


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"Expected `{name}` to be an integer of at least {least}. "
            f"Received: {name}={value!r} (of type {type(value).__name__})."
        )
