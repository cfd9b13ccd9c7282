"""Gossip: every worker mixes its model with those of partners that it draws at random.

References:
    Jin, Yuan, Iandola, Keutzer: How to scale distributed deep learning?, arXiv 1611.04581,
    pull-gossip and push-gossip.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


def drawn(random: np.random.Generator, workers: int) -> int:
    """Returns a partner, each worker as likely as any other, the one that draws included."""
    return int(random.integers(workers))


def pulled(model: Any, partners: Sequence[Any]) -> Any:
    """Returns a model after it has been averaged with those of its partners.

    Args:
        model: The worker's own, after its step.
        partners: What was read from the partners, one for each draw of another worker. A worker
            that has drawn itself reads nothing; with no partner at all its model stays as it is.
    """
    if not partners:
        return model
    return (model + sum(partners)) / (len(partners) + 1)


class Inbox(NamedTuple):
    """What others have pushed to a worker since it mixed last.

    Args:
        total: The sum of their models; `None` if nothing has come.
        count: How many there are.
    """

    total: Any = None
    count: int = 0


def received(inbox: Inbox, model: Any) -> Inbox:
    """Returns the inbox after one more model has come."""
    total = model if inbox.total is None else inbox.total + model
    return Inbox(total, inbox.count + 1)


def pushed(model: Any, inbox: Inbox, drew_itself: bool) -> Any:
    """Returns a model after it has been averaged with all that has come.

    The inbox is empty afterwards: begin a new one.

    Args:
        model: The worker's own, after its step.
        inbox: What has come.
        drew_itself: Whether the worker has just drawn itself as the partner to push to; its own
            model then counts twice.
    """
    if not inbox.count:
        return model
    weight = 2 if drew_itself else 1
    return (inbox.total + weight * model) / (inbox.count + weight)
