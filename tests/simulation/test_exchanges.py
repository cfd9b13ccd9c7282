"""Where a network limits each way of mixing models: experiment f5 of the digest of Jin et al."""

import numpy as np
import pytest

from tf_syncdist.cutoff import FullSync
from tf_syncdist.mixing import costs
from tf_syncdist.mixing.costs import Network
from tf_syncdist.simulation import exchanges, laws
from tf_syncdist.simulation.jobs import simulate

# ResNet-18, and a step of about a second.
MODEL_BYTES = 4 * 11.7e6
SIGMAS = [0.1, 0.3]
FREE = Network(1e18)


def times(steps: int, workers: int, sigma: float) -> np.ndarray:
    return laws.LogNormal(sigma).sample(steps, workers, np.random.default_rng(workers))


def loaded(load: float, workers: int, period: int, mean: float) -> Network:
    """A network in which exchanges keep a centre busy for `load` times the mean step."""
    return Network(2 * MODEL_BYTES * workers / (period * load * mean))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("period", [1, 10])
@pytest.mark.parametrize("workers", [8, 32])
def test_a_centre_is_saturated_when_exchanges_take_longer_than_a_step(
    workers: int, period: int, sigma: float
) -> None:
    seconds = times(400, workers, sigma)
    mean = seconds.mean()
    for load in (1.5, 3.0):
        network = loaded(load, workers, period, mean)
        most = period * costs.most_exchanges_per_second(MODEL_BYTES, network)
        pace = exchanges.elastic(seconds, MODEL_BYTES, network, period)
        assert pace.throughput == pytest.approx(most, rel=0.04)
        assert pace.throughput == pytest.approx(workers / mean / load, rel=0.04)
    # Below, workers set the pace: it is that of the computation and of their own exchanges.
    network = loaded(0.3, workers, period, mean)
    step = mean + costs.centre_seconds(MODEL_BYTES, network) / period
    pace = exchanges.elastic(seconds, MODEL_BYTES, network, period)
    assert 0.93 < pace.throughput / (workers / step) < 1.04


@pytest.mark.parametrize("sigma", SIGMAS)
def test_more_workers_help_a_centre_only_until_it_is_saturated(sigma: float) -> None:
    network = loaded(1.0, 8, 1, 1.0)
    few, most, more = (
        exchanges.elastic(times(300, p, sigma), MODEL_BYTES, network).throughput
        for p in (4, 16, 64)
    )
    assert most > 1.5 * few
    assert more == pytest.approx(most, rel=0.03)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("period", [1, 10])
def test_the_throughput_of_gossip_is_proportional_to_the_workers(period: int, sigma: float) -> None:
    # One in which a centre would be saturated by more than two workers.
    network = loaded(1.0, 2, period, 1.0)
    per_worker = [
        exchanges.gossip(times(2000, p, sigma), MODEL_BYTES, network, period).throughput / p
        for p in (2, 8, 32, 128)
    ]
    step = np.exp(sigma**2 / 2) + costs.gossip_seconds(MODEL_BYTES, network) / period
    assert per_worker == pytest.approx([1 / step] * 4, rel=0.02)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_efficiency_of_all_reduce_falls_like_the_slowest_of_p(sigma: float) -> None:
    efficiencies = []
    for workers in (1, 2, 8, 32, 128):
        seconds = times(2000, workers, sigma)
        pace = exchanges.all_reduce(seconds, MODEL_BYTES, FREE)
        efficiencies.append(pace.throughput * np.exp(sigma**2 / 2) / workers)
        # x_(p) of other draws.
        slowest = np.random.default_rng(0).lognormal(0, sigma, (4000, workers)).max(1).mean()
        assert efficiencies[-1] == pytest.approx(np.exp(sigma**2 / 2) / slowest, rel=0.02)
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[-1] < (0.82 if sigma == 0.1 else 0.55)


def test_all_reduce_is_what_rounds_that_wait_for_all_would_do() -> None:
    seconds = times(50, 16, 0.3)
    pace = exchanges.all_reduce(seconds, MODEL_BYTES, FREE)
    assert pace.throughput == pytest.approx(simulate(seconds, FullSync()).throughput)
    network = Network(1e9, latency_seconds=1e-3)
    slower = exchanges.all_reduce(seconds, MODEL_BYTES, network)
    exchange = 2 * MODEL_BYTES * 15 / 16 / 1e9 + 4e-3
    assert slower.seconds == pytest.approx(pace.seconds + 50 * exchange)


def test_a_worker_delayed_tenfold_slows_only_those_who_wait_for_it() -> None:
    seconds = times(300, 4, 0.1)
    network = loaded(0.2, 4, 1, 1.0)
    delayed = seconds * [1, 10, 1, 1]
    others = [0, 2, 3]
    for strategy in (exchanges.elastic, exchanges.gossip):
        before = strategy(seconds, MODEL_BYTES, network).per_second
        after = strategy(delayed, MODEL_BYTES, network).per_second
        assert np.all(after[others] >= 0.9 * before[others])
        assert after[1] < 0.15 * before[1]
    waiting = exchanges.all_reduce(delayed, MODEL_BYTES, network).throughput
    assert waiting < 0.15 * exchanges.all_reduce(seconds, MODEL_BYTES, network).throughput


def test_one_worker_alone_computes_and_exchanges() -> None:
    seconds, network = np.full((20, 1), 0.5), Network(2 * MODEL_BYTES, 0.25)
    assert exchanges.elastic(seconds, MODEL_BYTES, network).seconds == 20 * (0.5 + 1.25)
    assert exchanges.elastic(seconds, MODEL_BYTES, network, 4).seconds == 10 + 5 * 1.25
    assert exchanges.gossip(seconds, MODEL_BYTES, network).seconds == 20 * (0.5 + 0.75)
    assert exchanges.gossip(seconds, MODEL_BYTES, network, 4).seconds == 10 + 5 * 0.75
    assert exchanges.all_reduce(seconds, MODEL_BYTES, network).seconds == 10
