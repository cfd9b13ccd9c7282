"""Elastic averaging (EASGD): workers and a centre are drawn to one another, one worker at a time.

References:
    Zhang, Choromanska, LeCun: Deep learning with Elastic Averaging SGD, arXiv 1412.6651.
    Jin, Yuan, Iandola, Keutzer: How to scale distributed deep learning?, arXiv 1611.04581.
"""

from typing import Any


def default_moving_rate(workers: int) -> float:
    """Returns alpha = 0.8 / p, which is below the bound of stability for any p."""
    return 0.8 / workers


def largest_stable_moving_rate(workers: int) -> float:
    """Returns 2 / (p + 1), where all exchange at the same time; one at a time they may do more."""
    return 2.0 / (workers + 1)


def difference(model: Any, centre: Any, moving_rate: float) -> Any:
    """Returns d = alpha (model - centre), which the model gives up and the centre gains.

    Args:
        model: A worker's parameters before its own step.
        centre: The centre before it hears of this worker.
        moving_rate: alpha.
    """
    return moving_rate * (model - centre)


def exchanged(model: Any, centre: Any, moving_rate: float) -> tuple[Any, Any]:
    """Returns a worker's model and the centre after they have met; their sum is what it was.

    Args:
        model: The worker's parameters.
        centre: The centre.
        moving_rate: alpha.
    """
    given = difference(model, centre, moving_rate)
    return model - given, centre + given
