"""Every way into Keras' training: alike on all workers, and with b = 0 as in one process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

STEPS = 8
# Case: how many runs it has.
CASES = {
    "steps_per_execution": 2 * STEPS,
    "run_eagerly": 2 * STEPS,
    "class_weight": 2 * STEPS,
    "sample_weight": 2 * STEPS,
    "validation_split": 2 * 7,
    "named": 2 * STEPS,
    "own_step_metrics": 2 * STEPS,
    "own_step_tensors": 2 * STEPS,
    "train_on_batch": 2 * STEPS,
    "train_on_batch_weighted": 2 * STEPS,
    "batches_alone": 4 * STEPS,
    "py_dataset": 2 * STEPS,
    "py_dataset_threads": 2 * STEPS,
    "generator_once": STEPS,
    "generator_steps": 2 * STEPS,
    "dataset_steps": 15,
    "dataset_distributed": 2 * STEPS,
    "several_fits": 4 * STEPS,
    "sparse": 2 * STEPS,
    "ragged": 2 * STEPS,
    "strings": 2 * STEPS,
}
# Under any strategy Keras starts the threads of a PyDataset twice, and what they have fetched
# until then comes first: which batches these are is a matter of time.
AS_IN_ONE_PROCESS = [case for case in CASES if case != "py_dataset_threads"]
# Keras rounds steps_per_epoch=5 up to three times steps_per_execution=2.
ITERATIONS = {"dataset_steps": 18}
TOLERANCE = 1e-5  # Sums of float32 in another order, over 32 updates.


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    late = {"plain": False, "backup_workers": 1, "pause_seconds": 0.08}
    wanted = {
        "plain": {"workers": 0, "arguments": {"plain": True}},
        "all_needed": {"workers": 2, "arguments": {"plain": False}},
        "one_slow": {"workers": 2, "arguments": late},
    }
    with Jobs("corners.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def plain(jobs: Jobs) -> dict[str, Any]:
    return jobs["plain"].results[0]


@pytest.fixture(scope="module")
def all_needed(jobs: Jobs) -> JobResult:
    return jobs["all_needed"]


@pytest.fixture(scope="module")
def one_slow(jobs: Jobs) -> JobResult:
    return jobs["one_slow"]


@pytest.mark.parametrize("case", AS_IN_ONE_PROCESS)
def test_two_workers_end_as_one_process(
    case: str, plain: dict[str, Any], all_needed: JobResult
) -> None:
    all_needed.common(case, "weights_sha256")
    all_needed.common(case, "optimizer_sha256")
    expected = plain[case]
    assert all_needed.common(case, "iterations") == ITERATIONS.get(case, CASES[case])
    for weights in all_needed.each(case, "weights"):
        for received, value in zip(weights, expected["weights"], strict=True):
            np.testing.assert_allclose(received, value, atol=TOLERANCE)


@pytest.mark.parametrize("case", AS_IN_ONE_PROCESS)
def test_two_workers_have_the_logs_of_one_process(
    case: str, plain: dict[str, Any], all_needed: JobResult
) -> None:
    history = all_needed.common(case, "history")
    assert history.keys() == plain[case]["history"].keys()
    for name, values in plain[case]["history"].items():
        np.testing.assert_allclose(history[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_slow_worker_ends_like_the_other(case: str, one_slow: JobResult) -> None:
    one_slow.common(case, "weights_sha256")
    one_slow.common(case, "optimizer_sha256")
    one_slow.common(case, "iterations")
    one_slow.common(case, "history")


@pytest.mark.parametrize("case", CASES)
def test_every_run_is_counted(case: str, all_needed: JobResult, one_slow: JobResult) -> None:
    for job in (all_needed, one_slow):
        assert job.common(case, "rounds") == job.common(case, "iterations")
    assert all_needed.each(case, "left_out") == [0, 0]


def test_one_worker_alone_tests_and_predicts_batches(
    all_needed: JobResult, one_slow: JobResult
) -> None:
    for job in (all_needed, one_slow):
        alone = job.results[1]["alone"]
        assert alone["tested"] == pytest.approx(alone["accuracy"])
        assert alone["difference"] < 1e-5


def test_a_slow_worker_is_left_out(one_slow: JobResult) -> None:
    left_out = [one_slow.each(case, "left_out") for case in CASES]
    assert sum(slow for _, slow in left_out) > 5 * sum(fast for fast, _ in left_out)
