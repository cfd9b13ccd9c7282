"""Policies that plan by the times of the last rounds."""

import math

import numpy as np
import pytest

from tf_syncdist.cutoff import Elfving, OrderStatistics, Plan, Planner, RoundTimes, SliceView
from tf_syncdist.cutoff.elfving import normal_scores

PLANNED = [Elfving(), OrderStatistics()]


def cut(seconds: np.ndarray, count: int, present: np.ndarray | None = None) -> RoundTimes:
    """A round that was closed with its first so many contributions."""
    present = np.ones(len(seconds), bool) if present is None else present
    closed = np.sort(seconds[present])[count - 1]
    known = np.where(present & (seconds <= closed), seconds, math.nan)
    return RoundTimes(0, known, float(closed), present)


def cut_by_plans(planner: Planner, rounds: np.ndarray) -> list[int]:
    """Returns how many contributions each round had."""
    counts = []
    for seconds in rounds:
        counts.append(planner.plan().count)
        planner.observe(cut(seconds, counts[-1]))
    return counts


@pytest.mark.parametrize("policy", PLANNED)
def test_everybody_is_waited_for_before_something_is_known(policy: Elfving) -> None:
    plan = policy.planner(7).plan()
    assert (plan.count, plan.expected_seconds) == (7, None)
    view = SliceView(1.0, 0.0, 6, 7, 7)
    assert not policy.decide(view).close
    assert policy.decide(view._replace(contributions=7)).close


@pytest.mark.parametrize("policy", PLANNED)
def test_a_slice_closes_as_planned_and_says_why(policy: Elfving) -> None:
    view = SliceView(1.0, 0.0, 5, 8, 8, Plan(6, 1.25, "of a test"))
    assert not policy.decide(view).close
    decision = policy.decide(view._replace(contributions=6))
    assert decision.close
    assert decision.reason == "the first 6 of 8 are in; planned 6 in 1.25 s: of a test"
    assert policy.decide(view._replace(possible=5)).close


@pytest.mark.parametrize("policy", [Elfving(min_fraction=0.5), OrderStatistics(min_fraction=0.5)])
def test_no_plan_closes_a_slice_with_fewer_than_the_least_workers(policy: Elfving) -> None:
    view = SliceView(1.0, 0.0, 3, 8, 8, Plan(1, 1.25, "of a test"))
    assert not policy.decide(view).close
    assert policy.decide(view._replace(contributions=4)).close


@pytest.mark.parametrize("policy", [Elfving(min_fraction=0.5), OrderStatistics(min_fraction=0.5)])
def test_no_plan_is_below_the_least_workers(policy: Elfving) -> None:
    """The first of ten is a hundred times faster than the others, so one would be best."""
    planner = policy.planner(10)
    for _ in range(5):
        planner.observe(cut(np.array([0.01, *np.linspace(1, 9, 9)]), 10))
    assert 5 <= planner.plan().count <= 10


@pytest.mark.parametrize("policy", PLANNED)
@pytest.mark.parametrize(("cv", "best"), [(0.05, 156), (0.3, 140)])
def test_cut_normal_times_give_the_plans_of_whole_ones(
    policy: Elfving, cv: float, best: int
) -> None:
    """What is not seen must not be forgotten: a policy that did would wait for ever fewer."""
    rounds = np.random.default_rng(0).normal(1, cv, (400, 158))
    counts = cut_by_plans(policy.planner(158), rounds)
    assert counts[0] == 158
    assert abs(np.mean(counts[-200:]) - best) < 3


def test_elfving_finds_the_law_behind_cut_times() -> None:
    planner = Elfving().planner(100)
    for seconds in np.random.default_rng(0).normal(3, 0.6, (20, 100)):
        planner.observe(cut(seconds, 70))
    reason = planner.plan().reason
    mean, deviation = (float(w) for w in reason.split() if w[0].isdigit() and "." in w)
    assert mean == pytest.approx(3, abs=0.05)
    assert deviation == pytest.approx(0.6, rel=0.08)


def test_elfving_scores_are_those_of_a_normal_sample() -> None:
    """Target f1 of the digest of Teng and Wood: within 1 % for 5 <= k <= n - 4."""
    for cv in (0.05, 0.2):
        samples = np.sort(np.random.default_rng(1).normal(1, cv, (20_000, 158)), axis=1)
        expected = 1 + cv * normal_scores(158)
        error = np.abs(expected / samples.mean(axis=0) - 1)
        assert error[4:154].max() < 0.01


def test_order_statistics_follow_a_group_that_becomes_slow_and_fast_again() -> None:
    noise = np.random.default_rng(0).normal(1, 0.05, (150, 100))
    slow = np.ones((150, 100))
    slow[50:100, :30] = 10
    counts = cut_by_plans(OrderStatistics(5).planner(100), noise * slow)
    assert min(counts[10:50]) > 90
    # Some rounds are lost until it is known; then hardly one waits for any of the 30.
    assert counts[50] > 90
    assert np.mean([c <= 70 for c in counts[53:100]]) > 0.8
    assert min(counts[125:]) > 90


@pytest.mark.parametrize("policy", PLANNED)
def test_workers_that_are_not_there_are_neither_fast_nor_slow(policy: Elfving) -> None:
    rng = np.random.default_rng(0)
    planner = policy.planner(100)
    present = np.arange(100) < 60
    for seconds in rng.normal(1, 0.01, (30, 100)):
        planner.observe(cut(seconds, 60, present))
    plan = planner.plan()
    assert 55 <= plan.count <= 60
    assert plan.expected_seconds == pytest.approx(1, abs=0.05)
    for seconds in rng.normal(1, 0.01, (30, 100)):
        planner.observe(cut(seconds, 100))
    assert 95 <= planner.plan().count <= 100


@pytest.mark.parametrize("policy", PLANNED)
def test_rounds_that_tell_nothing_do_no_harm(policy: Elfving) -> None:
    planner = policy.planner(4)
    nobody = RoundTimes(0, np.full(4, math.nan), 1.0, np.zeros(4, bool))
    unknown = RoundTimes(1, np.full(4, math.nan), 1.0, np.ones(4, bool))
    equal = RoundTimes(2, np.full(4, 2.0), 2.0, np.ones(4, bool))
    for times in (nobody, unknown, equal, nobody, unknown, equal):
        planner.observe(times)
        assert 1 <= planner.plan().count <= 4
    assert planner.plan().count == 4


@pytest.mark.parametrize("policy", PLANNED)
def test_the_same_rounds_give_the_same_plans(policy: Elfving) -> None:
    rounds = np.random.default_rng(3).lognormal(0, 0.3, (60, 30))
    assert cut_by_plans(policy.planner(30), rounds) == cut_by_plans(policy.planner(30), rounds)


@pytest.mark.parametrize("cls", [Elfving, OrderStatistics])
@pytest.mark.parametrize("window", [0, -1, 1.0, True, "20", None])
def test_a_window_that_is_none_is_refused(cls: type, window: object) -> None:
    with pytest.raises(ValueError, match="`window`") as error:
        cls(window)
    assert f"window={window!r}" in str(error.value)


@pytest.mark.parametrize("cls", [Elfving, OrderStatistics])
@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, True, "0.5", None, math.nan])
def test_a_fraction_that_is_none_is_refused(cls: type, fraction: object) -> None:
    with pytest.raises(ValueError, match="`min_fraction`") as error:
        cls(min_fraction=fraction)
    assert f"min_fraction={fraction!r}" in str(error.value)
