"""The life of a learned cutoff: recording, training, use, and what follows from a change."""

from pathlib import Path

import numpy as np
import pytest

from tf_syncdist import cutoff
from tf_syncdist.cutoff import LearnedCutoff, Plan, RoundTimes, SliceView, models, replay
from tf_syncdist.cutoff.audition import Audition
from tf_syncdist.cutoff.learned import LearnedPlanner
from tf_syncdist.cutoff.models import RunTimeModel
from tf_syncdist.errors import RunTimeModelError

from .models import model
from .regimes import regimes, round_times

N = 24
SWITCHING = regimes(1500, N, 4, 2.5, seed=3)
STEADY = regimes(1500, N, 4, 1.0, seed=3)
MODEL = model()


def play(planner: LearnedPlanner, seconds: np.ndarray) -> list[Plan]:
    """Runs rounds by the planner's own plans, which are returned."""
    plans = []
    for run, row in enumerate(seconds):
        plans.append(planner.plan())
        planner.observe(round_times(row, plans[-1].count, run))
    return plans


def throughput(plans: list[Plan], seconds: np.ndarray) -> float:
    lengths = [np.sort(row)[plan.count - 1] for plan, row in zip(plans, seconds, strict=True)]
    return sum(plan.count for plan in plans) / sum(lengths)


def with_model(trained: RunTimeModel = MODEL) -> LearnedPlanner:
    return LearnedPlanner(LearnedCutoff(warmup_rounds=200), N, trained)


def test_everybody_is_waited_for_until_there_is_enough_to_learn_from() -> None:
    planner = LearnedCutoff(warmup_rounds=200).planner(N)
    for row in SWITCHING[:200]:
        assert planner.plan() == Plan(
            N, None, "everybody is waited for while run-times are recorded"
        )
        assert planner.training_request() is None
        planner.observe(round_times(row))
    request = planner.training_request()
    np.testing.assert_array_equal(request.trace.seconds, SWITCHING[:200])
    assert request.trace.present.all() and request.seed == 0
    assert planner.training_request() is None


def test_the_smoother_is_followed_while_a_model_is_trained_if_it_was_better_than_fixed() -> None:
    planner = LearnedCutoff(warmup_rounds=300).planner(N)
    play(planner, SWITCHING[:300])
    plans = play(planner, SWITCHING[300:])
    assert {plan.reason for plan in plans} == {"predicted by the smoother"}
    assert throughput(plans, SWITCHING[300:]) > 0.93 * replay.oracle_throughput(SWITCHING[300:])


def test_everybody_is_waited_for_where_prediction_is_of_no_use() -> None:
    planner = LearnedCutoff(warmup_rounds=300).planner(N)
    plans = play(planner, STEADY[:400])
    assert {plan.count for plan in plans} == {N}
    assert "no prediction was better" in plans[-1].reason


def test_a_model_is_used_if_it_is_better_than_the_best_fixed_cutoff() -> None:
    planner = LearnedCutoff(warmup_rounds=200).planner(N)
    play(planner, SWITCHING[:200])
    planner.training_request()
    assert planner.accept(MODEL) == (
        "it is used: on held-out rounds it gives 2 contributions per second, "
        "the best fixed cutoff, 23, 1"
    )
    plans = play(planner, SWITCHING[200:])
    used = [plan.reason for plan in plans]
    assert used.count("predicted by the hidden Markov chains") > 0.8 * len(used)
    assert throughput(plans, SWITCHING[200:]) > 0.95 * replay.oracle_throughput(SWITCHING[200:])
    closed = [np.sort(row)[p.count - 1] for p, row in zip(plans, SWITCHING[200:], strict=True)]
    expected = [plan.expected_seconds for plan in plans]
    # A mean, with the rare rounds in which a node slows down.
    assert np.median(np.abs(np.array(expected) / closed - 1)) < 0.06
    assert planner.training_request() is None


def test_a_model_that_is_no_better_is_not_used_and_more_rounds_are_recorded_for_another() -> None:
    planner = LearnedCutoff(warmup_rounds=100, seed=5).planner(N)
    play(planner, STEADY[:100])
    assert planner.training_request().seed == 5
    assert planner.accept(model(factor=1.0, learned=1.0)).startswith("it is not used: ")
    for row in STEADY[100:299]:
        assert planner.plan().count == N
        planner.observe(round_times(row))
        assert planner.training_request() is None
    planner.observe(round_times(STEADY[299]))
    request = planner.training_request()
    assert request.seed == 6 and request.trace.num_rounds == 300


def test_a_training_that_failed_is_tried_again_with_more_rounds() -> None:
    planner = LearnedCutoff(warmup_rounds=100).planner(N)
    play(planner, STEADY[:100])
    asked = []
    for run, row in enumerate(STEADY[100:1000], 100):
        if planner.training_request():
            asked.append(run)
            planner.training_failed("exit code 1")
        planner.observe(round_times(row))
    assert asked == [100, 300, 700]


def test_a_given_model_is_used_when_everybody_was_seen() -> None:
    plans = play(with_model(), SWITCHING[:100])
    assert [plan.count for plan in plans[:20]] == [N] * 20
    assert all(plan.reason.startswith("predicted by") for plan in plans[20:])


@pytest.mark.parametrize(
    "factor, before, changed",
    [(2.5, SWITCHING[:300], SWITCHING[:500] * 1.5), (1.0, STEADY[:300], SWITCHING[:500])],
)
def test_a_changed_cluster_is_noticed_costs_little_and_is_learned_anew(
    factor: float, before: np.ndarray, changed: np.ndarray
) -> None:
    planner = with_model(model(factor=factor))
    assert "changed" not in play(planner, before)[-1].reason
    plans = play(planner, changed)
    full = [run for run, plan in enumerate(plans) if "cluster has changed" in plan.reason]
    assert len(full) == 20 and full[0] < 200
    assert all(plans[run].count == N for run in full)
    after = slice(full[-1] + 1, None)
    oracle = replay.oracle_throughput(changed[after])
    assert throughput(plans[after], changed[after]) > 0.9 * oracle
    request = planner.training_request()
    assert request is not None
    # Only what came after the change is learned from.
    assert request.trace.num_rounds == len(changed) - full[0]
    planner.accept(MODEL)
    assert planner.training_request() is None


def test_an_unchanged_cluster_is_not_taken_for_a_changed_one() -> None:
    planner = with_model()
    plans = play(planner, regimes(1200, N, 4, 2.5, seed=11))
    assert not [plan for plan in plans if "changed" in plan.reason]


def test_workers_that_have_left_are_not_planned_for_and_are_when_they_are_back() -> None:
    planner = with_model()
    play(planner, SWITCHING[:40])
    for row in STEADY[:30]:
        times = round_times(row[4:])
        planner.observe(
            RoundTimes(
                0,
                np.r_[np.full(4, np.nan), times.seconds],
                times.closed_seconds,
                np.arange(N) >= 4,
            )
        )
        assert planner.plan().count <= N - 4
    play(planner, STEADY[30:40])
    assert planner.plan().count > N - 4


def test_no_plan_is_below_the_fraction() -> None:
    # Half of the workers are ten times as fast as the others.
    seconds = regimes(200, N, 4, 1.0, seed=1)
    seconds[:, 6:] *= 10
    for min_fraction, count in ((0.25, 6), (0.5, N), (1.0, N)):
        policy = LearnedCutoff(warmup_rounds=100, min_fraction=min_fraction)
        plans = play(LearnedPlanner(policy, N, MODEL), seconds)
        assert plans[-1].count >= min_fraction * N
        assert abs(plans[-1].count - count) <= 2


def test_a_file_is_looked_into_when_it_is_given_and_read_by_the_planner(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    with pytest.raises(RunTimeModelError, match="not there"):
        LearnedCutoff.load(path)
    models.save(path, MODEL)
    policy = LearnedCutoff.load(path, seed=3)
    assert policy == LearnedCutoff(model=str(path), seed=3)
    assert play(policy.planner(N), SWITCHING[:30])[-1].reason.startswith("predicted by")
    path.write_bytes(b"")
    with pytest.raises(RunTimeModelError, match="cut off"):
        policy.planner(N)


def test_a_job_with_other_workers_goes_on_as_without_a_model(tmp_path: Path) -> None:
    models.save(tmp_path / "model.npz", MODEL)
    policy = LearnedCutoff.load(tmp_path / "model.npz", warmup_rounds=100)
    planner = policy.planner(12)
    plans = play(planner, regimes(100, 12, 2, 2.5, seed=0))
    assert {plan.count for plan in plans} == {12}
    assert plans[0].reason.startswith("the model is of 24 workers, not 12; ")
    assert planner.training_request().trace.num_workers == 12
    with pytest.raises(RunTimeModelError, match=r"of 12 workers.*Received: one of 24"):
        planner.accept(MODEL)
    # The planner can be used further, and may be told that there is no model.
    planner.training_failed("of other workers")
    assert planner.plan().count <= 12


def test_rounds_of_other_workers_are_refused() -> None:
    planner = LearnedCutoff().planner(N)
    with pytest.raises(ValueError, match=r"times of 24 workers. Received: shape \[23\]"):
        planner.observe(round_times(SWITCHING[0, :23]))
    planner.observe(round_times(SWITCHING[0])._replace(seconds=np.full(N, np.nan)))
    assert planner.plan().count == N


def test_predictions_that_are_no_numbers_are_an_error_and_no_plan() -> None:
    broken = MODEL._replace(chains=MODEL.chains._replace(means=MODEL.chains.means * np.nan))
    weights = MODEL.weights._replace(mean_bias=MODEL.weights.mean_bias * np.nan)
    planner = with_model(broken._replace(weights=weights))
    with pytest.raises(FloatingPointError, match="Expected finite predictions"):
        play(planner, SWITCHING[:100])


def test_equal_rounds_give_equal_plans() -> None:
    assert play(with_model(), SWITCHING[:200]) == play(with_model(), SWITCHING[:200])


@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"model": 3}, "path of a file"),
        ({"model": ""}, "path of a file"),
        ({"warmup_rounds": 99}, "at least 100"),
        ({"warmup_rounds": 200.0}, "float"),
        ({"warmup_rounds": True}, "bool"),
        ({"seed": -1}, "at least 0"),
        ({"min_fraction": 0}, "min_fraction=0"),
        ({"min_fraction": 1.5}, "min_fraction=1.5"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict, part: str) -> None:
    with pytest.raises(ValueError, match="Received: ") as error:
        LearnedCutoff(**arguments)
    assert part in str(error.value)


def test_the_policy_travels_and_decides_as_planned() -> None:
    policy = LearnedCutoff("model.npz", 200, 0.5, 7)
    assert cutoff.deserialize(cutoff.serialize(policy)) == policy
    assert policy.replicas_to_aggregate(10) == 10
    view = SliceView(1.0, 0.0, 6, 10, 10, Plan(7, 0.9, "why"))
    assert not policy.decide(view).close
    decision = policy.decide(view._replace(contributions=7))
    assert decision.close and "why" in decision.reason
    assert not policy.decide(view._replace(contributions=9, plan=None)).close


def test_an_audition_is_passed_by_plans_that_beat_every_fixed_cutoff() -> None:
    audition = Audition(4)
    assert not audition.passed
    for run in range(10):
        # One or two workers are slow; a plan that knows how many is better than 2 or 3.
        slow = 1 + run % 2
        audition.observe(round_times([1.0] * (4 - slow) + [9.0] * slow), 4 - slow)
    assert audition.passed
    for run in range(10):
        slow = 1 + run % 2
        audition.observe(round_times([1.0] * (4 - slow) + [9.0] * slow), 4)
    assert not audition.passed
    # A round that did not wait for everybody tells nothing.
    before = Audition(4)
    before.observe(round_times([1.0, 1.0, 1.0, 9.0], 3), 3)
    assert not before.passed
