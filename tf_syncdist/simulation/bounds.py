"""What a policy can be measured by: what one would do that knew the run-times beforehand."""

import dataclasses
from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff import Decision, Plan, SliceView
from tf_syncdist.cutoff.decisions import (
    FrozenPolicy,
    check_min_fraction,
    close_as_planned,
    least_count,
)
from tf_syncdist.cutoff.order_statistics import best_count
from tf_syncdist.cutoff.replay import oracle_throughput, static_throughputs


@dataclasses.dataclass(frozen=True)
class GreedyOracle(FrozenPolicy):
    """Closes each round where contributions per second are highest in this round.

    It sees when everybody will be in. It does not look beyond the round, so a policy that does can
    be better by a few per cent.

    Args:
        min_fraction: No fewer than this fraction of the workers, as for the policies that it is
            compared with.
    """

    min_fraction: float = 0.25

    def __post_init__(self) -> None:
        check_min_fraction(self.min_fraction)

    def foresee(self, seconds: np.ndarray) -> Plan:
        """Returns the best plan for a round whose times are known."""
        expected = np.sort(seconds)
        count = best_count(expected, least_count(self.min_fraction, len(seconds)))
        return Plan(count, float(expected[count - 1]), "foreseen")

    def decide(self, view: SliceView) -> Decision:
        """Closes a slice with as many contributions as are planned."""
        return close_as_planned(view, self.min_fraction)


def greedy_throughput(seconds: np.ndarray, min_fraction: float = 0.25) -> float:
    """Returns what `GreedyOracle` gives where late workers begin the next round with the others.

    Args:
        seconds: float64, [rounds, num_workers].
        min_fraction: No fewer than this fraction of the workers.
    """
    return oracle_throughput(seconds, least_count(min_fraction, seconds.shape[1]))


class Static(NamedTuple):
    """The best number of contributions if it has to be the same in all rounds.

    Args:
        count: The number.
        throughput: Contributions per second with it.
    """

    count: int
    throughput: float


def best_static(seconds: np.ndarray) -> Static:
    """Returns the best fixed number of contributions, in hindsight.

    Args:
        seconds: float64, [rounds, num_workers].

    Example:

    >>> best_static(np.array([[1.0, 1.5, 9.0], [2.0, 1.0, 7.0]]))
    Static(count=2, throughput=1.1428571428571428)
    """
    throughputs = static_throughputs(seconds)
    best = int(np.argmax(throughputs))
    return Static(best + 1, float(throughputs[best]))
