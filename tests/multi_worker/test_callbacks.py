"""Callbacks decide for all workers, also where only one of them wants something."""

from collections.abc import Iterator

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

STEPS = 12
EVERYDAY = {
    "scheduler": 4 * STEPS,
    "plateau": 4 * STEPS,
    "early": 2 * STEPS,
    "after_early": 2 * STEPS,
    "after_nan": STEPS,
    "by_hand": 4 * STEPS,
    "checkpoint": 2 * STEPS,
    "after_loaded_by_all": STEPS,
    "loaded_by_chief": STEPS,
    "new_loaded_by_chief": STEPS,
    "while_saving": 3 * STEPS,
    "continued": STEPS,
}
# By how many steps an execution has; between two epochs it makes no difference.
WISHES = {
    1: [
        *(
            f"{at} of {who}"
            for at in ("on_train_batch_end", "on_epoch_end", "on_epoch_begin")
            for who in (0, 1)
        ),
        "on_epoch_end of all",
        "on_train_batch_end of all",
    ],
    3: [
        "on_train_batch_end of 0",
        "on_train_batch_end of 1",
        "on_epoch_begin of 1",
        "on_epoch_end of all",
    ],
}
EACH_WISH = [(steps, case) for steps, cases in WISHES.items() for case in cases]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    names = "schedules early not_a_number weights_by_hand files whole_models".split()
    given = {
        "everyday_0": {"parts": names, "backup_workers": 0, "pause_seconds": 0.0},
        "everyday_1": {"parts": names, "backup_workers": 1, "pause_seconds": 0.05},
    }
    for steps, cases in WISHES.items():
        given[f"wishes_{steps}"] = {
            "parts": [f"wishes_by_{steps}"],
            "wishes": cases,
            "backup_workers": 1,
            "pause_seconds": 0.05,
        }
    wanted = {name: {"workers": 2, "arguments": a} for name, a in given.items()}
    with Jobs("callbacks.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module", params=[0, 1], ids=["all_needed", "one_slow"])
def everyday(request: pytest.FixtureRequest, jobs: Jobs) -> JobResult:
    return jobs[f"everyday_{request.param}"]


@pytest.mark.parametrize("case", EVERYDAY)
def test_workers_do_and_log_the_same(case: str, everyday: JobResult) -> None:
    results = everyday.each(case)
    # A slow worker may be given the chief's variables as they are some runs later.
    assert all(r | {"began_with": ""} == results[0] | {"began_with": ""} for r in results), results
    assert results[0]["runs"] == EVERYDAY[case]


def test_learning_rates_change_alike(everyday: JobResult) -> None:
    rates = [float(r) for r in everyday.common("scheduler", "rate")]
    assert rates == pytest.approx([0.05, 0.025, 0.05 / 3, 0.0125])
    # It was 0.0125; the first epoch is an improvement upon nothing, and each other one is not.
    assert everyday.common("plateau", "at_the_end") == pytest.approx(0.0125 / 8)


def test_the_best_weights_are_restored_everywhere(everyday: JobResult) -> None:
    assert everyday.common("early", "is_best")
    assert everyday.common("early", "stops")
    assert not everyday.common("after_early", "stops")


@pytest.mark.parametrize("case", ["nan_data", "nan_layer"])
def test_all_stop_if_one_worker_sees_nan(case: str, everyday: JobResult) -> None:
    assert everyday.common(case, "runs") < 2 * STEPS
    assert everyday.common(case, "epochs") <= 2
    assert everyday.common(case, "stops")
    everyday.common(case, "weights_sha256")


def test_what_is_loaded_is_trained_on_with(
    everyday: JobResult, request: pytest.FixtureRequest
) -> None:
    everyday.common("loaded_by_all", "weights_sha256")
    # The chief alone had loaded it: a fit starts from its variables.
    loaded = everyday.results[0]["started_from"]
    began_with = everyday.each("loaded_by_chief", "began_with")
    assert began_with[0] == loaded
    assert "differs from worker 0" in everyday.logs["worker 1"]
    everyday.common("loaded_by_chief", "weights_sha256")
    if not request.node.callspec.params["everyday"]:
        # A slow worker may be given them as they are some runs later.
        assert began_with[1] == loaded


def test_a_saved_model_continues_with_its_optimizer(everyday: JobResult) -> None:
    saved = everyday.results[0]["saved"]
    assert everyday.common("loaded") == saved
    # One epoch, two of the three that followed, and one more.
    assert everyday.common("continued", "iterations") == 4 * STEPS


@pytest.mark.parametrize(("steps", "case"), EACH_WISH)
def test_all_stop_at_the_same_run(steps: int, case: str, jobs: Jobs) -> None:
    found = jobs[f"wishes_{steps}"].common(f"{case} by {steps}")
    assert 0 < found["runs"] < 30 * STEPS
    assert found["runs"] % steps == 0
    # No epoch is begun in vain.
    assert found["epochs"] == -(-found["runs"] // STEPS)
    assert found["stops"]


@pytest.mark.parametrize("steps", WISHES)
def test_all_stop_where_all_want_to(steps: int, jobs: Jobs) -> None:
    job = jobs[f"wishes_{steps}"]
    assert job.common(f"on_epoch_end of all by {steps}", "runs") == STEPS


@pytest.mark.parametrize(("steps", "case"), EACH_WISH)
def test_a_later_fit_is_not_stopped(steps: int, case: str, jobs: Jobs) -> None:
    found = jobs[f"wishes_{steps}"].common(f"after {case} by {steps}")
    assert found["runs"] == 2 * STEPS
    assert not found["stops"]
