"""The figures that a learned cutoff must reach; minutes of training, so run with `-m slow`."""

import time

import numpy as np
import pytest

from tf_syncdist.cutoff import LearnedCutoff, RoundTimes, replay, traces
from tf_syncdist.cutoff.learned import LearnedPlanner, experts
from tf_syncdist.cutoff.models import RunTimeModel
from tf_syncdist.cutoff.network import Network
from tf_syncdist.cutoff_training import training

from ..cutoff.regimes import regimes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FULL_ROUNDS = 20


def train(num_workers: int, nodes: int, factor: float, seed: int = 0) -> RunTimeModel:
    seconds = regimes(2000, num_workers, nodes, factor, seed=101 + seed)
    return training.train(traces.of_seconds(seconds), seed=seed)


def ratios(predictor: object, seconds: np.ndarray) -> tuple[float, float]:
    """Returns the throughput over that of the oracle, and over that of the best fixed cutoff."""
    least = seconds.shape[1] // 4
    played = replay.replay(predictor, seconds, least, FULL_ROUNDS)
    part = slice(FULL_ROUNDS, None)
    throughput = replay.Replay(played.counts[part], played.seconds[part]).throughput
    static = replay.static_throughputs(seconds[part]).max()
    return throughput / replay.oracle_throughput(seconds[part], least), throughput / static


def test_regimes_of_factor_two_and_a_half() -> None:
    tests = [regimes(3000, 158, 4, 2.5, seed) for seed in (1, 2)]
    learned, network = [], []
    for seed in range(3):
        begun = time.monotonic()
        model = train(158, 4, 2.5, seed)
        assert time.monotonic() - begun < 180
        learned += [ratios(experts(model), seconds) for seconds in tests]
        network += [ratios(Network(model.weights), seconds)[0] for seconds in tests]
    oracle, static = np.mean(learned, axis=0)
    assert oracle >= 0.95 and static >= 1.2
    assert np.mean(network) >= 0.93


@pytest.mark.parametrize("factor, least_oracle, least_static", [(1.6, 0.98, 1.0), (1.0, 0.0, 0.98)])
def test_smaller_factors(factor: float, least_oracle: float, least_static: float) -> None:
    oracle, static = ratios(experts(train(158, 4, factor)), regimes(3000, 158, 4, factor, 1))
    assert oracle >= least_oracle and static >= least_static


def test_two_thousand_workers() -> None:
    model = train(2175, 32, 2.5)
    oracle, _ = ratios(experts(model), regimes(800, 2175, 32, 2.5, 1))
    assert oracle >= 0.92


@pytest.mark.parametrize("trained, factor, slower", [(1.0, 2.5, 1.0), (2.5, 2.5, 1.5)])
def test_a_change_of_law(trained: float, factor: float, slower: float) -> None:
    model = train(158, 4, trained)
    planner = LearnedPlanner(LearnedCutoff(), 158, model)
    after = regimes(500, 158, 4, factor, 52) * slower
    counts, lengths = [], []
    for run, row in enumerate(np.concatenate((regimes(300, 158, 4, trained, 2), after))):
        count = planner.plan().count
        closed = float(np.sort(row)[count - 1])
        seen = np.where(row <= closed, row, np.nan)
        planner.observe(RoundTimes(run, seen, closed, np.ones(158, bool)))
        counts.append(count)
        lengths.append(closed)
    throughput = sum(counts[400:]) / sum(lengths[400:])
    assert throughput >= 0.90 * replay.oracle_throughput(after[100:], 39)
