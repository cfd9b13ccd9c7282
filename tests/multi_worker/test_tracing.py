"""Functions are traced in the first steps only, and not much more often than elsewhere."""

from typing import Any

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(280)

STEPS = 5
# After how many steps nothing is traced any more; a smaller last batch is traced too.
CASES = {
    "fit_arrays": 1,
    "fit_dataset": 1,
    "fit_several_steps": 1,
    "fit_several_steps_arrays": 1,
    "fit_ragged": STEPS + 1,
    "in_function": 1,
    "around_function": 1,
    "epoch_in_function": 1,
    "in_function_ragged": STEPS + 1,
    "around_function_ragged": STEPS + 1,
}
# How many traces more than under MirroredStrategy there may be.
MORE = 0


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = {"strategy": "mirrored"}
    directory = tmp_path_factory.mktemp("mirrored")
    return run_job("tracing.py", directory, workers=0, arguments=arguments).results[0]


@pytest.fixture(scope="module", params=[0, 1], ids=["together", "slow"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    backup_workers = request.param
    return run_job(
        "tracing.py",
        tmp_path_factory.mktemp("job"),
        workers=2,
        arguments={
            "strategy": "own",
            "backup_workers": backup_workers,
            "pause_seconds": 0.05 * backup_workers,
        },
    )


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_traced_after_the_first_steps(job: JobResult, case: str) -> None:
    for received in job.each(case):
        seen = received["seen"]
        steps = CASES[case]
        # There is a second epoch in the first fit, and a second fit.
        assert len(seen) >= 2 * received["first_fit"] >= 2 * steps
        assert seen[steps - 1 :] == [seen[-1]] * (len(seen) - steps + 1)


@pytest.mark.parametrize("case", CASES)
def test_it_is_traced_as_often_as_under_mirrored_strategy(
    job: JobResult, mirrored: dict[str, Any], case: str
) -> None:
    expected = mirrored[case]["seen"][-1]
    for received in job.each(case):
        assert received["seen"][-1].keys() == expected.keys()
        for name, count in received["seen"][-1].items():
            assert 0 < count <= expected[name] + MORE, name


FITS = [c for c in CASES if c.startswith("fit")]


@pytest.mark.parametrize("case", FITS)
def test_an_epoch_has_the_announced_number_of_updates(job: JobResult, case: str) -> None:
    # Also where several steps are one execution, and their number does not divide that of batches.
    assert job.common(case, "iterations") == 4 * (STEPS + (case == "fit_ragged"))


def test_a_slow_worker_has_replayed(job: JobResult, request: pytest.FixtureRequest) -> None:
    is_slow = bool(request.node.callspec.params["job"])
    assert (job.results[1]["local"]["replayed"] > 0) == is_slow
