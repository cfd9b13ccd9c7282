"""Callbacks decide for all workers, also where only one of them wants something."""

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(400)

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
WISHES = [
    *(
        f"{at} of {who}"
        for at in ("on_train_batch_end", "on_epoch_end", "on_epoch_begin")
        for who in (0, 1)
    ),
    "on_epoch_end of all",
    "on_train_batch_end of all",
]


@pytest.fixture(scope="module", params=[0, 1], ids=["all_needed", "one_slow"])
def everyday(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    names = "schedules early not_a_number weights_by_hand files whole_models"
    return run_job(
        "callbacks.py",
        tmp_path_factory.mktemp("everyday"),
        workers=2,
        arguments={
            "parts": names.split(),
            "backup_workers": request.param,
            "pause_seconds": 0.05 * request.param,
        },
    )


@pytest.fixture(scope="module", params=[1, 3], ids=["one_step", "three_steps"])
def wishes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, JobResult]:
    steps = request.param
    job = run_job(
        "callbacks.py",
        tmp_path_factory.mktemp("wishes"),
        workers=2,
        arguments={
            "parts": [f"wishes_by_{steps}"],
            "backup_workers": 1,
            "pause_seconds": 0.05,
        },
    )
    return steps, job


@pytest.mark.parametrize("case", EVERYDAY)
def test_workers_do_and_log_the_same(case: str, everyday: JobResult) -> None:
    assert everyday.common(case)["runs"] == EVERYDAY[case]


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


def test_what_is_loaded_is_trained_on_with(everyday: JobResult) -> None:
    everyday.common("loaded_by_all", "weights_sha256")
    # The chief alone had loaded it: a fit starts from its variables.
    loaded = everyday.results[0]["started_from"]
    assert everyday.common("loaded_by_chief", "began_with") == loaded


def test_a_saved_model_continues_with_its_optimizer(everyday: JobResult) -> None:
    saved = everyday.results[0]["saved"]
    assert everyday.common("loaded") == saved
    # One epoch, two of the three that followed, and one more.
    assert everyday.common("continued", "iterations") == 4 * STEPS


@pytest.mark.parametrize("case", WISHES)
def test_all_stop_at_the_same_run(case: str, wishes: tuple[int, JobResult]) -> None:
    steps, job = wishes
    found = job.common(f"{case} by {steps}")
    assert 0 < found["runs"] < 30 * STEPS
    assert found["runs"] % steps == 0
    # No epoch is begun in vain.
    assert found["epochs"] == -(-found["runs"] // STEPS)
    assert found["stops"]


def test_all_stop_where_all_want_to(wishes: tuple[int, JobResult]) -> None:
    steps, job = wishes
    assert job.common(f"on_epoch_end of all by {steps}", "runs") == STEPS


@pytest.mark.parametrize("case", WISHES)
def test_a_later_fit_is_not_stopped(case: str, wishes: tuple[int, JobResult]) -> None:
    steps, job = wishes
    found = job.common(f"after {case} by {steps}")
    assert found["runs"] == 2 * STEPS
    assert not found["stops"]
