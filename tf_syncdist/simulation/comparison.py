"""Policies side by side: the same run-times for all of them, and for the oracle."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff import BackupWorkers, CutoffPolicy
from tf_syncdist.cutoff.replay import static_throughputs
from tf_syncdist.simulation.bounds import GreedyOracle, greedy_throughput
from tf_syncdist.simulation.jobs import Outcome, Trainer, simulate


class Row(NamedTuple):
    """What a policy gave.

    Args:
        policy: Its name.
        throughput: Contributions per second.
        oracle_ratio: The same, as a fraction of what the greedy oracle gives.
        contributions: The mean number of contributions per round.
        round_seconds: The mean length of a round.
        rounds: How many rounds were measured.
        dropped: int64, [num_workers]. For how many rounds each worker was late.
        skipped: int64, [num_workers]. For how many it was still busy with an older one.
        reason: What the policy said of the last round.
    """

    policy: str
    throughput: float
    oracle_ratio: float
    contributions: float
    round_seconds: float
    rounds: int
    dropped: np.ndarray
    skipped: np.ndarray
    reason: str

    @property
    def computed(self) -> int:
        """How many parts the rounds have, one of each worker."""
        return self.rounds * len(self.dropped)


class Comparison(NamedTuple):
    """What several policies gave.

    Args:
        rows: A row for each.
        oracle_throughput: Contributions per second of the greedy oracle.
    """

    rows: list[Row]
    oracle_throughput: float


class Curve(NamedTuple):
    """What backup workers give.

    Args:
        backup_workers: The values of b.
        throughputs: Contributions per second with each of them.
    """

    backup_workers: list[int]
    throughputs: list[float]

    @property
    def best(self) -> int:
        """The best b."""
        return self.backup_workers[int(np.argmax(self.throughputs))]


def compare(
    seconds: np.ndarray,
    policies: Mapping[str, CutoffPolicy],
    late_workers_stay_busy: bool = False,
    first_round: int = 0,
    train: Trainer | None = None,
) -> Comparison:
    """Returns what each policy gives, and what the oracle does.

    Args:
        seconds: float64, [rounds, num_workers]. How long each worker needs for each round.
        policies: The policies by name.
        late_workers_stay_busy: See `simulate`.
        first_round: From which round on is measured; what was before only teaches the policies.
        train: See `simulate`.
    """
    busy = late_workers_stay_busy
    if busy:
        oracle = simulate(seconds, GreedyOracle(), busy, first_round).throughput
    else:
        oracle = greedy_throughput(seconds[first_round:])
    rows = []
    for name, policy in policies.items():
        outcome = simulate(seconds, policy, busy, first_round, train)
        rows.append(_row(name, outcome, oracle))
    return Comparison(rows, oracle)


def sweep(seconds: np.ndarray, late_workers_stay_busy: bool = False, most: int = 40) -> Curve:
    """Returns what each number of backup workers gives.

    Args:
        seconds: float64, [rounds, num_workers]. How long each worker needs for each round.
        late_workers_stay_busy: See `simulate`. Then each value costs a simulation, and
        most: so many values are tried at most, those near 0 closest to one another.
    """
    num_workers = seconds.shape[1]
    if not late_workers_stay_busy:
        throughputs = static_throughputs(seconds)[::-1]
        return Curve(list(range(num_workers)), throughputs.tolist())
    values = _spread(num_workers, most)
    outcomes = (simulate(seconds, BackupWorkers(b), True) for b in values)
    return Curve(values, [outcome.throughput for outcome in outcomes])


def _row(name: str, outcome: Outcome, oracle_throughput: float) -> Row:
    return Row(
        name,
        outcome.throughput,
        outcome.throughput / oracle_throughput,
        float(outcome.contributions.mean()),
        float(outcome.round_seconds.mean()),
        len(outcome.round_seconds),
        outcome.dropped,
        outcome.skipped,
        outcome.reason,
    )


def _spread(num_workers: int, most: int) -> list[int]:
    """Returns numbers from 0 to workers - 1 whose distances grow."""
    if num_workers <= most:
        return list(range(num_workers))
    few: Iterable[float] = np.geomspace(1, num_workers, most) - 1
    return sorted({round(b) for b in few} - {num_workers})
