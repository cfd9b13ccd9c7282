"""Training loops of a user's own, with a slow worker, in every way in which they can be written."""

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(260)

WORKERS = 3
SLOW = 1
STEPS = 30
VARIANTS = ("run_in_function", "function_in_run", "eager")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    directory = tmp_path_factory.mktemp("custom_loop")
    return run_job("custom_loop.py", directory, workers=WORKERS, arguments={"slow": SLOW})


@pytest.mark.parametrize("variant", VARIANTS)
def test_workers_end_with_the_same_bits(job: JobResult, variant: str) -> None:
    job.common(variant, "weights_sha256")
    job.common(variant, "optimizer_sha256")
    assert job.common(variant, "iterations") == STEPS
    assert job.common(variant, "steps") == STEPS


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_round_is_counted_and_nobody_waits(job: JobResult, variant: str) -> None:
    for received in job.each(variant):
        assert received["rounds"] == STEPS
        assert received["contributed"] + received["late"] + received["replayed"] == STEPS
    slow = job.results[SLOW][variant]
    assert slow["late"] + slow["replayed"] > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_are_those_of_all_workers(job: JobResult, variant: str) -> None:
    accuracy, loss = job.common(variant, "metrics")
    assert 0 < accuracy <= 1
    assert loss > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_reduced_over_the_replicas_of_a_worker(job: JobResult, variant: str) -> None:
    for received in job.each(variant):
        assert received["examples"] == [16] * STEPS
        assert received["losses_are_finite"]
    assert job.results[0][variant]["last_loss"] < job.results[0][variant]["first_loss"]


def test_the_input_context_tells_the_truth(job: JobResult) -> None:
    assert job.each("contexts") == [[[WORKERS, index, WORKERS - 1]] for index in range(WORKERS)]


def test_the_report_agrees_with_each_worker(job: JobResult) -> None:
    report = job.common("report")
    assert report["rounds"] == STEPS * len(VARIANTS)
    for reported, local in zip(report["workers"], job.each("local"), strict=True):
        for name in ("contributed", "late", "replayed", "missed"):
            assert reported[name] == local[name]


def test_logs_are_silent(job: JobResult) -> None:
    for index in range(1, WORKERS):
        lines = [
            line
            for line in job.logs[f"worker {index}"].splitlines()
            if "0000 00:" not in line and "absl::" not in line
        ]
        # Without a graph, what a replay would leave out cannot be seen; it is said once.
        assert len([i for i in lines if "runs without a graph" in i]) <= 1
        assert [i for i in lines if "runs without a graph" not in i] == []
