"""The asynchronous parameter server: differences are added one by one, and nobody waits.

References:
    Dean et al.: Large Scale Distributed Deep Networks, NIPS 2012, Downpour SGD.
    Jin, Yuan, Iandola, Keutzer: How to scale distributed deep learning?, arXiv 1611.04581.
"""

from typing import Any, NamedTuple


class Served(NamedTuple):
    """What the server holds.

    Args:
        model: The current parameters.
        version: How many differences they have taken in.
    """

    model: Any
    version: int = 0


def difference(stepped: Any, pulled: Any) -> Any:
    """Returns what a worker pushes: what its optimizer has added to the model that it pulled.

    For plain SGD that is the negative gradient times the learning rate.
    """
    return stepped - pulled


def staleness(served: Served, version: int) -> int:
    """Returns how many differences of others were added since a worker pulled a version."""
    return served.version - version


def accepts(served: Served, version: int, max_staleness: int | None) -> bool:
    """Returns whether a push may be added.

    Args:
        served: The server.
        version: Of the parameters that the pushing worker has computed with.
        max_staleness: The most that is allowed; `None` for any.
    """
    return max_staleness is None or staleness(served, version) <= max_staleness


def pushed(served: Served, pushed_difference: Any) -> Served:
    """Returns the server after a push."""
    return Served(served.model + pushed_difference, served.version + 1)
