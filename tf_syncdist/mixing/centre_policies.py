"""How the service mixes workers' models with the centre that it holds: small frozen policies.

The rules work on flat arrays, in place, and part by part, so that a part stays in the cache.
"""

import dataclasses
import json
from typing import Any, Protocol

import numpy as np

from tf_syncdist.mixing import elastic, parameter_server
from tf_syncdist.mixing.parameter_server import Served

_CHUNK = 1 << 15


class CentrePolicy(Protocol):
    """What the service needs of a policy."""

    def admits(self, staleness: int) -> bool:
        """Returns whether the centre takes in values of so great a staleness."""
        ...

    def mix(self, centre: np.ndarray, received: np.ndarray, reply: np.ndarray) -> None:
        """Lets the centre take in values.

        Args:
            centre: The centre, changed in place.
            received: What a worker has sent.
            reply: Where is written what the worker is told.
        """
        ...

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate the policy."""
        ...


@dataclasses.dataclass(frozen=True)
class ElasticCentre:
    """Elastic averaging: the centre moves towards each model by a fraction of their difference.

    The worker sends its model and is told the centre as it was before, so that it moves by the same
    difference the other way, and the sum of both is kept.

    Args:
        moving_rate: The fraction, above 0 and below 1.

    Example:

    >>> centre, reply = np.zeros(1), np.empty(1)
    >>> ElasticCentre(moving_rate=0.25).mix(centre, np.array([8.0]), reply)
    >>> centre.tolist(), reply.tolist()
    ([2.0], [0.0])

    References:
        Zhang, Choromanska, LeCun: Deep learning with Elastic Averaging SGD, arXiv 1412.6651; Jin,
        Yuan, Iandola, Keutzer, arXiv 1611.04581.
    """

    moving_rate: float

    def __post_init__(self) -> None:
        rate = self.moving_rate
        if not isinstance(rate, int | float) or not 0 < rate < 1:
            raise ValueError(
                f"`moving_rate` must be above 0 and below 1. Received: moving_rate={rate!r}."
            )

    def admits(self, staleness: int) -> bool:
        """Returns `True`: a model is no difference to an older one."""
        del staleness
        return True

    def mix(self, centre: np.ndarray, received: np.ndarray, reply: np.ndarray) -> None:
        """Lets the centre take in a model; see `CentrePolicy`."""
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, centre.size, _CHUNK):
                own = centre[start : start + _CHUNK]
                reply[start : start + _CHUNK] = own
                own += elastic.difference(received[start : start + _CHUNK], own, self.moving_rate)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate the policy."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class AsyncCentre:
    """The asynchronous parameter server: the centre adds what workers' optimizers have changed.

    The worker sends the difference that its step has made and is told the parameters that come of
    it, with everybody's differences in them.

    Args:
        max_staleness: A difference is left out if the centre has taken in more than this many
            others since the parameters were read that it was computed from. Default: `None`, no
            bound.

    Example:

    >>> centre, reply = np.ones(1), np.empty(1)
    >>> AsyncCentre().mix(centre, np.array([-0.5]), reply)
    >>> centre.tolist(), reply.tolist()
    ([0.5], [0.5])

    References:
        Dean et al.: Large Scale Distributed Deep Networks, NIPS 2012, section 4.1 (Downpour SGD).
    """

    max_staleness: int | None = None

    def __post_init__(self) -> None:
        bound = self.max_staleness
        whole = isinstance(bound, int) and not isinstance(bound, bool)
        if bound is not None and not (whole and bound >= 0):
            raise ValueError(
                "`max_staleness` must be a whole number from 0, or None for no bound. "
                f"Received: max_staleness={bound!r}."
            )

    def admits(self, staleness: int) -> bool:
        """Returns whether a difference of this staleness is added."""
        return parameter_server.accepts(Served(None, staleness), 0, self.max_staleness)

    def mix(self, centre: np.ndarray, received: np.ndarray, reply: np.ndarray) -> None:
        """Lets the centre take in a difference; see `CentrePolicy`."""
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, centre.size, _CHUNK):
                own = centre[start : start + _CHUNK]
                part = received[start : start + _CHUNK]
                own[...] = parameter_server.pushed(Served(own), part).model
                reply[start : start + _CHUNK] = own

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate the policy."""
        return dataclasses.asdict(self)


_CLASSES = {cls.__name__: cls for cls in (ElasticCentre, AsyncCentre)}


def serialize(policy: CentrePolicy) -> str:
    """Returns text that is the same exactly for equal policies; workers compare it."""
    text = {"class_name": type(policy).__name__, "config": policy.get_config()}
    return json.dumps(text, sort_keys=True)


def deserialize(text: str) -> CentrePolicy:
    """Returns the policy that a text stands for.

    Raises:
        ValueError: If it stands for none.
    """
    try:
        given = json.loads(text)
        return _CLASSES[given["class_name"]](**given["config"])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(
            f"Expected a policy of a centre as JSON, one of {', '.join(_CLASSES)}. Received: "
            f"{text[:200]!r} ({type(e).__name__}: {e})."
        ) from e
