"""Synchronous model averaging (SMA): many small-batch learners around one central model.

References:
    Koliousis et al.: CROSSBOW: Scaling Deep Learning with Small Batch Sizes on Multi-GPU Servers,
    arXiv 1901.02244, section 3, algorithm 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

# A learning rate that has fallen below this share of what it was is a drop: schedules in steps fall
# to a half or less, while a smooth one gets here every now and then.
_DROP = 0.75


class Central(NamedTuple):
    """The central model and how it moved last.

    Args:
        model: z, which is tested and delivered.
        move: z - z_prev, zero at the start.
    """

    model: Any
    move: Any


def default_correction(learners: int) -> float:
    """Returns alpha = 1 / k, with which the central model moves to the mean of k learners.

    Args:
        learners: k, of all workers together.
    """
    return 1.0 / learners


def largest_stable_correction(learners: int) -> float:
    """Returns 2 / (k + 1): from there on learners and central model overshoot one another.

    That holds without momentum and for small learning rates; a learning rate takes a little away.

    Args:
        learners: k, of all workers together.
    """
    return 2.0 / (learners + 1)


def correction_of(learner: Any, central_model: Any, correction: float) -> Any:
    """Returns c_i = alpha (w_i - z), which a learner gives up and the central model gains.

    Args:
        learner: w_i before the learner's own step.
        central_model: z before this round.
        correction: alpha.
    """
    return correction * (learner - central_model)


def moved(central: Central, corrections: Any, momentum: float) -> Central:
    """Returns the central model after a round: z + sum of c_i + mu (z - z_prev).

    Args:
        central: Before the round.
        corrections: The sum of the corrections of all learners.
        momentum: mu; 0.9 in the authors' code.
    """
    move = corrections + momentum * central.move
    return Central(central.model + move, move)


def averaged(
    learners: Sequence[Any],
    steps: Sequence[Any],
    central: Central,
    correction: float,
    momentum: float = 0.0,
) -> tuple[list[Any], Central]:
    """Returns learners and central model after one round in which they are averaged.

    Args:
        learners: w_i before the round.
        steps: What each learner's optimizer adds to its model, computed at w_i.
        central: The central model before the round.
        correction: alpha.
        momentum: mu, of the central model.
    """
    given = [correction_of(w, central.model, correction) for w in learners]
    after = [w + s - c for w, s, c in zip(learners, steps, given, strict=True)]
    return after, moved(central, sum(given), momentum)


def averaged_in_groups(
    groups: Sequence[Sequence[Any]],
    steps: Sequence[Sequence[Any]],
    references: Sequence[Central],
    correction: float,
    momentum: float = 0.0,
) -> tuple[list[list[Any]], list[Central]]:
    """Returns the same where every group of learners has a reference model of its own.

    Learners give their corrections to their group's reference; one sum per group travels, and each
    reference moves by the sum of all. References are equal before, so they are equal afterwards.

    Args:
        groups: The learners of each group before the round.
        steps: What their optimizers add to them.
        references: The groups' copies of the central model.
        correction: alpha, for the number of learners of all groups together.
        momentum: mu.
    """
    sums, after = [], []
    for learners, own_steps, reference in zip(groups, steps, references, strict=True):
        given = [correction_of(w, reference.model, correction) for w in learners]
        sums.append(sum(given))
        after.append([w + s - c for w, s, c in zip(learners, own_steps, given, strict=True)])
    total = sum(sums)
    return after, [moved(reference, total, momentum) for reference in references]


def restarts(learning_rate: float, highest: float) -> bool:
    """Returns whether the learning rate has dropped, so that learners start again from z.

    What learners have explored at a higher rate is spread wider than the new one can mend.

    Args:
        learning_rate: Of the coming step.
        highest: The highest one since the last restart.
    """
    return learning_rate < _DROP * highest
