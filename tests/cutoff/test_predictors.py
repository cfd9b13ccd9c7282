"""Predictors: what they expect, and what late workers tell them."""

from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.cutoff import groups, markov_fit, replay, traces
from tf_syncdist.cutoff.experts import Experts
from tf_syncdist.cutoff.markov import Markov
from tf_syncdist.cutoff.network import Network
from tf_syncdist.cutoff.normal import log_tail
from tf_syncdist.cutoff.predictors import Predictor, expected_order
from tf_syncdist.cutoff.smoothing import Smoother

from .models import random_weights
from .regimes import regimes, round_times

NUM_WORKERS, NODES = 24, 4
TRAINING = regimes(800, NUM_WORKERS, NODES, 2.5, seed=1)
CHAINS = markov_fit.fit(np.log(TRAINING), np.ones(TRAINING.shape, bool))

MAKERS: dict[str, Callable[[], Predictor]] = {
    "smoother": lambda: Smoother(NUM_WORKERS),
    "markov": lambda: Markov(CHAINS),
    "network": lambda: Network(random_weights(NUM_WORKERS)),
    "experts": lambda: Experts({"one": Smoother(NUM_WORKERS), "two": Markov(CHAINS)}),
}
# Of a network nothing can be expected before it is trained.
ABLE = ["smoother", "markov", "experts"]


def fed(predictor: Predictor, seconds: np.ndarray, count: int | None = None) -> Predictor:
    for run, row in enumerate(seconds):
        predictor.observe(round_times(row, count, run))
    return predictor


def medians(predictor: Predictor) -> np.ndarray:
    return np.median(predictor.samples(), axis=0)


@pytest.mark.parametrize("name", MAKERS)
def test_equal_rounds_give_equal_draws_and_draws_are_times(name: str) -> None:
    rounds = TRAINING[:60]
    one, two = fed(MAKERS[name](), rounds, 18), fed(MAKERS[name](), rounds, 18)
    drawn = one.samples()
    assert drawn.dtype == np.float32 and drawn.shape == (100, NUM_WORKERS)
    assert np.isfinite(drawn).all() and (drawn > 0).all()
    np.testing.assert_array_equal(drawn, two.samples())
    # Whoever asks may overwrite them, as often as it asks.
    drawn[:] = np.nan
    assert np.isfinite(one.samples()).all()
    times = round_times(TRAINING[60], 18)
    assert one.log_score(times) == two.log_score(times)


@pytest.mark.parametrize("name", ABLE)
def test_workers_are_expected_to_go_on_as_they_were(name: str) -> None:
    seconds = regimes(40, NUM_WORKERS, NODES, 1.0, seed=2)
    seconds[20:, :6] *= 2.5
    predictor = fed(MAKERS[name](), seconds)
    expected = np.r_[np.full(6, 2.5), np.full(18, 1.0)]
    np.testing.assert_allclose(medians(predictor), expected, rtol=0.06)


@pytest.mark.parametrize("name", ABLE)
def test_late_workers_are_expected_to_be_late_again_and_to_be_in_when_they_were(name: str) -> None:
    seconds = regimes(60, NUM_WORKERS, NODES, 1.0, seed=2)
    seconds[20:40, :6] *= 2.5
    # Their first slow round ended before they were in, and so do all that follow.
    predictor = fed(MAKERS[name](), seconds[:20])
    fed(predictor, seconds[20:40], 18)
    late = medians(predictor)[:6]
    assert (late > seconds[20:40, 6:].max(axis=1).mean()).all()
    if name == "markov":
        np.testing.assert_allclose(late, 2.5, rtol=0.06)
    fed(predictor, seconds[40:44])
    np.testing.assert_allclose(medians(predictor), 1.0, rtol=0.1)


@pytest.mark.parametrize("name", ABLE)
def test_a_worker_that_is_known_to_be_slow_stays_so_while_it_is_not_waited_for(name: str) -> None:
    seconds = regimes(80, NUM_WORKERS, NODES, 1.0, seed=2)
    seconds[10:, :6] *= 2.5
    predictor = fed(MAKERS[name](), seconds[:20])
    fed(predictor, seconds[20:], 18)
    np.testing.assert_allclose(medians(predictor)[:6], 2.5, rtol=0.1)


@pytest.mark.parametrize("name", ABLE)
def test_an_absent_worker_is_neither_late_nor_early(name: str) -> None:
    seconds = regimes(50, NUM_WORKERS, NODES, 1.0, seed=2)
    predictor = fed(MAKERS[name](), seconds[:20])
    for row in seconds[20:]:
        times = round_times(row)
        times.present[0], times.seconds[0] = False, np.nan
        predictor.observe(times)
    np.testing.assert_allclose(medians(predictor), 1.0, rtol=0.06)


@pytest.mark.parametrize("name", ABLE)
def test_what_was_likely_scores_higher(name: str) -> None:
    seconds = regimes(41, NUM_WORKERS, NODES, 1.0, seed=2)
    predictor = fed(MAKERS[name](), seconds[:40])
    likely = predictor.log_score(round_times(seconds[40]))
    assert likely > predictor.log_score(round_times(seconds[40] * 1.5)) + 1
    late = np.where(np.arange(NUM_WORKERS) < 6, seconds[40] * 3, seconds[40])
    assert predictor.log_score(round_times(late, 18)) < likely - 0.5
    # That the last of them is late by a little says little.
    assert predictor.log_score(round_times(seconds[40], 23)) > likely - 0.5
    # Nothing is as unlikely as to outweigh everything else.
    assert predictor.log_score(round_times(seconds[40] * 1e6)) > -8


@pytest.mark.parametrize("name", ["smoother", "markov"])
def test_draws_know_that_a_node_slows_down_as_a_whole(name: str) -> None:
    # Of 400 workers on 40 nodes, two or three nodes change in every ten rounds.
    seconds = regimes(700, 400, 40, 2.5, seed=5)
    predictor: Predictor = Smoother(400)
    if name == "markov":
        predictor = Markov(markov_fit.fit(np.log(seconds[:450]), np.ones((450, 400), bool)))
    fed(predictor, seconds[450:])
    slow_now = seconds[-1] > 1.7
    drawn = predictor.samples()[:, ~slow_now] > 1.7
    node = (np.arange(400) // 10)[~slow_now]
    of_node = np.stack([drawn[:, node == i].mean(axis=1) for i in np.unique(node)], axis=1)
    # Nodes are slow as a whole or not at all, about one in a hundred.
    assert ((of_node > 0.8) | (of_node < 0.2)).mean() > 0.99
    assert 0.002 < (of_node > 0.8).mean() < 0.03


def test_groups_are_the_nodes_and_chains_know_how_long_they_stay_slow() -> None:
    node = np.arange(NUM_WORKERS) * NODES // NUM_WORKERS
    np.testing.assert_array_equal(CHAINS.group, node)
    np.testing.assert_allclose(np.exp(CHAINS.means), [[1.0, 2.5]] * NUM_WORKERS, rtol=0.03)
    np.testing.assert_allclose(CHAINS.deviations, 0.05, rtol=0.15)
    assert 0.003 < CHAINS.transitions[:, 0, 1].mean() < 0.03
    assert 0.01 < CHAINS.transitions[:, 1, 0].mean() < 0.1
    alone = groups.learned(np.random.default_rng(0).standard_normal((200, 10)))
    np.testing.assert_array_equal(alone, np.arange(10))


def test_a_node_that_was_never_slow_is_expected_to_become_so_like_others() -> None:
    seconds = TRAINING.copy()
    seconds[:, :6] = regimes(800, 6, 1, 1.0, seed=3)
    chains = markov_fit.fit(np.log(seconds), np.ones(seconds.shape, bool))
    np.testing.assert_allclose(np.exp(chains.means[:, 1]), 2.5, rtol=0.1)
    predictor = fed(Markov(chains), seconds[:20])
    slow = regimes(5, NUM_WORKERS, NODES, 1.0, seed=4)
    slow[:, :6] *= 2.5
    fed(predictor, slow, 18)
    np.testing.assert_allclose(medians(predictor)[:6], 2.5, rtol=0.1)


def test_chains_are_learned_from_rounds_that_did_not_wait_for_late_workers_too() -> None:
    smoother = Smoother(NUM_WORKERS)
    log_seconds, seen = [], []
    for run, row in enumerate(TRAINING):
        times = round_times(row, None if run % 5 == 0 else 18)
        smoother.observe(times)
        log_seconds.append(smoother.imputed)
        seen.append(~np.isnan(times.seconds))
    assert np.mean(seen) < 0.85
    chains = markov_fit.fit(np.array(log_seconds), np.array(seen))
    np.testing.assert_allclose(np.exp(chains.means), [[1.0, 2.5]] * NUM_WORKERS, rtol=0.05)


def test_experts_follow_the_better_one_and_change_over_within_a_few_rounds() -> None:
    good, bad = Smoother(NUM_WORKERS), Markov(CHAINS)
    experts = Experts({"markov": bad, "smoother": good})
    assert experts.followed == "markov"
    fed(experts, TRAINING[:100])
    assert experts.followed == "markov"
    # A cluster that the chains know nothing of.
    changed = TRAINING[100:140] * 1.5
    followed = []
    for row in changed:
        experts.observe(round_times(row))
        followed.append(experts.followed)
    assert followed[8:] == ["smoother"] * 32
    scores = experts.last_scores
    assert scores["smoother"] > scores["markov"] + 1


@pytest.mark.parametrize("name", ABLE)
def test_cutoffs_by_prediction_are_near_the_oracle(name: str) -> None:
    seconds = regimes(600, NUM_WORKERS, NODES, 2.5, seed=6)
    played = replay.replay(MAKERS[name](), seconds, least=6, full_rounds=5)
    oracle = replay.oracle_throughput(seconds, least=6)
    static = replay.static_throughputs(seconds)
    assert played.throughput > 0.93 * oracle
    assert played.throughput > 1.1 * static.max()
    assert static.max() <= oracle
    assert static[-1] == pytest.approx(NUM_WORKERS * 600 / seconds.max(axis=1).sum())


def test_what_comes_of_few_workers_and_few_rounds() -> None:
    predictor = fed(Smoother(1), [[2.0]] * 3)
    order = expected_order(predictor.samples(), np.ones(1, bool))
    np.testing.assert_allclose(order, [2.0], rtol=0.05)
    trace = traces.of_seconds([[0.0, 0.0], [0.0, 1.0]])
    predictor = Smoother(2)
    for times in trace.rounds():
        predictor.observe(times)
    assert np.isfinite(predictor.samples()).all()


@pytest.mark.parametrize("name", ["smoother", "network"])
def test_nothing_is_predicted_before_the_first_round(name: str) -> None:
    with pytest.raises(RuntimeError, match="Expected a round to be observed"):
        MAKERS[name]().samples()


def test_the_tail_of_the_normal_law() -> None:
    import math

    z = np.linspace(-6, 6, 101)
    exact = [math.log(0.5 * math.erfc(v / math.sqrt(2))) for v in z]
    np.testing.assert_allclose(log_tail(z), exact, rtol=1e-3, atol=1e-6)
    far = log_tail(np.array([30.0, 100.0]))
    np.testing.assert_allclose(far, [-454.3, -5005.5], rtol=1e-3)
