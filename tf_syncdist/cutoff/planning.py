"""What an adaptive policy is told of the rounds that are over, and what it plans for the next."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from tf_syncdist.cutoff.models import RunTimeModel
    from tf_syncdist.cutoff.traces import Trace


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


class TrainingRequest(NamedTuple):
    """What a planner wants a run-time model to be trained on.

    Args:
        trace: The rounds to learn from.
        seed: Seed of the training, so that the same job asks for the same model.
    """

    trace: "Trace"
    seed: int


class LearningPlanner(Planner, Protocol):
    """A planner that has a model of the cluster trained while it plans.

    It cannot train by itself: that takes minutes and TensorFlow. Whoever feeds it asks for
    `training_request` after each `observe`, has the model trained somewhere else, goes on with
    `observe` and `plan` meanwhile, and answers with one call of `accept` or `training_failed`
    between two of these. The planner asks for nothing more before it has this answer.

    In a process of its own, a training is `traces.save(FILE, request.trace)`, then
    `python -m tf_syncdist.train_cutoff --trace=FILE --output=MODEL --seed=SEED`, then
    `models.load(MODEL)`.
    """

    def training_request(self) -> TrainingRequest | None:
        """Returns what is to be trained now, each request once; `None` most of the time."""
        ...

    def accept(self, model: "RunTimeModel") -> str:
        """Takes the model that was asked for.

        Returns:
            One clause for a log: whether the model is used from now on, and why.

        Raises:
            RunTimeModelError: If the model is of other workers. The planner can be used further.
        """
        ...

    def training_failed(self, reason: str) -> None:
        """Takes note that there will be no model; the planner asks again later, if at all."""
        ...
