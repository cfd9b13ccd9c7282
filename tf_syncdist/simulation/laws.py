"""Laws of run-times: how long each worker needs for each round of a job that nobody runs."""

import dataclasses
from typing import Protocol

import numpy as np


class Law(Protocol):
    """How long workers take."""

    def sample(self, num_rounds: int, num_workers: int, rng: np.random.Generator) -> np.ndarray:
        """Returns run-times in seconds.

        Args:
            num_rounds: How many rounds.
            num_workers: How many workers.
            rng: Where the randomness comes from.

        Returns:
            float64, [num_rounds, num_workers], above 0.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Chen2016:
    """Workers on 100 machines with a GPU each: mostly 1.4 s to 1.6 s, now and then much longer.

    Independent for every worker and round; calibrated to the figures that are known of the paper.

    References:
        Chen, Pan, Monga, Bengio, Jozefowicz: Revisiting Distributed Synchronous SGD,
        arXiv 1604.00981, on stragglers.
    """

    def sample(self, num_rounds: int, num_workers: int, rng: np.random.Generator) -> np.ndarray:
        """Returns run-times in seconds, [num_rounds, num_workers]."""
        shape = (num_rounds, num_workers)
        usual = 1.4 + rng.normal(0, 0.05, shape) + rng.exponential(0.07, shape)
        delay = (rng.random(shape) < 0.012) * (0.6 + rng.exponential(3.0, shape))
        return _positive(usual + delay)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal times with a mean of 1 s, independent for every worker and round.

    Args:
        cv: The standard deviation, in seconds.
    """

    cv: float = 0.1

    def sample(self, num_rounds: int, num_workers: int, rng: np.random.Generator) -> np.ndarray:
        """Returns run-times in seconds, [num_rounds, num_workers]."""
        return _positive(rng.normal(1, self.cv, (num_rounds, num_workers)))


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """Lognormal times with a median of 1 s, independent for every worker and round.

    Args:
        sigma: The standard deviation of the logarithm.
    """

    sigma: float = 0.1

    def sample(self, num_rounds: int, num_workers: int, rng: np.random.Generator) -> np.ndarray:
        """Returns run-times in seconds, [num_rounds, num_workers]."""
        return rng.lognormal(0, self.sigma, (num_rounds, num_workers))


@dataclasses.dataclass(frozen=True)
class Exponential:
    """1 s and an exponential delay, independent for every worker and round.

    Args:
        mean: The mean of the delay, in seconds.
    """

    mean: float = 0.1

    def sample(self, num_rounds: int, num_workers: int, rng: np.random.Generator) -> np.ndarray:
        """Returns run-times in seconds, [num_rounds, num_workers]."""
        return 1 + rng.exponential(self.mean, (num_rounds, num_workers))


@dataclasses.dataclass(frozen=True)
class Pareto:
    """Pareto times of 1 s at least: a few are very long. Independent for every worker and round.

    Args:
        a: The shape; the smaller, the heavier the tail.
    """

    a: float = 3.0

    def sample(self, num_rounds: int, num_workers: int, rng: np.random.Generator) -> np.ndarray:
        """Returns run-times in seconds, [num_rounds, num_workers]."""
        return 1 + rng.pareto(self.a, (num_rounds, num_workers))


@dataclasses.dataclass(frozen=True)
class RegimeSwitching:
    """Nodes that become slow now and then, with all of their workers, and stay so for a while.

    Workers are on nodes in order, equally many on each. All nodes are normal at first.

    Args:
        factor: How much longer everything takes on a slow node.
        nodes: How many nodes there are.
        enter: Probability that a normal node is slow in the next round.
        leave: Probability that a slow node is normal in the next round.
        cv: Standard deviation of the time of a worker, divided by its mean. The mean is 1 s on a
            normal node.

    References:
        Teng, Wood: High Throughput Synchronous Distributed SGD, arXiv 1803.04209, whose clusters
        (158 workers on 4 nodes, 2,175 on 32) this imitates.
    """

    factor: float = 2.5
    nodes: int = 4
    enter: float = 0.01
    leave: float = 0.03
    cv: float = 0.05

    def sample(self, num_rounds: int, num_workers: int, rng: np.random.Generator) -> np.ndarray:
        """Returns run-times in seconds, [num_rounds, num_workers]."""
        slow = np.empty((num_rounds, self.nodes), bool)
        state = np.zeros(self.nodes, bool)
        for row, draw in zip(slow, rng.random((num_rounds, self.nodes)), strict=True):
            row[:] = state = np.where(state, draw >= self.leave, draw < self.enter)
        node = np.arange(num_workers) * self.nodes // num_workers
        means = np.where(slow[:, node], self.factor, 1.0)
        return _positive(means * rng.normal(1, self.cv, means.shape))


_LAWS: dict[str, tuple[type, str | None]] = {
    "chen2016": (Chen2016, None),
    "normal": (Normal, "cv"),
    "lognormal": (LogNormal, "sigma"),
    "exponential": (Exponential, "mean"),
    "pareto": (Pareto, "a"),
    "regime_switching": (RegimeSwitching, "factor"),
}

NAMES = tuple(_LAWS)


def law(text: str, nodes: int | None = None) -> Law:
    """Returns the law of a name.

    Args:
        text: A name, and perhaps a value of what matters most about the law: `chen2016`,
            `normal:CV`, `lognormal:SIGMA`, `exponential:MEAN`, `pareto:A`,
            `regime_switching:FACTOR`.
        nodes: How many nodes the workers are on, for `regime_switching`; 4 by default.

    Raises:
        ValueError: If there is no such law.

    Example:

    >>> law("lognormal:0.3")
    LogNormal(sigma=0.3)
    """
    name, colon, value = text.partition(":")
    if name not in _LAWS:
        raise ValueError(f"Expected a law of {', '.join(_LAWS)}. Received: {text!r}.")
    cls, parameter = _LAWS[name]
    arguments: dict[str, float] = {}
    if colon:
        if parameter is None:
            raise ValueError(f"Expected `{name}` without a value. Received: {text!r}.")
        arguments[parameter] = positive_number(value, f"{name}:{parameter.upper()}", text)
    if name == "regime_switching" and nodes is not None:
        if nodes < 1:
            raise ValueError(f"Expected at least one node. Received: nodes={nodes}.")
        arguments["nodes"] = nodes
    return cls(**arguments)


def positive_number(value: str, form: str, text: str) -> float:
    """Returns the positive number that a part of a name is.

    Args:
        value: The part.
        form: How such a name looks, for the message.
        text: The whole name, for the message.

    Raises:
        ValueError: If it is none.
    """
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"Expected {form} with a positive number. Received: {text!r}.")
    return number


def _positive(seconds: np.ndarray) -> np.ndarray:
    # A normal law knows times below 0; nobody takes less than a hundredth of what is usual.
    return np.maximum(seconds, 0.01)
