"""Without backup workers, several workers train as one process does on the whole batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(260)

CASES = {
    "sgd_sequential_arrays": 1e-6,
    "adam_functional_dataset": 2e-5,
    "adamw_subclassed_weighted": 2e-5,
    "sgd_accumulation": 1e-6,
    "sgd_eager": 1e-6,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("plain")
    return run_job("equivalence.py", directory, workers=0, arguments={"plain": True}).results[0]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    directory = tmp_path_factory.mktemp("two_workers")
    return run_job("equivalence.py", directory, workers=2, arguments={"plain": False})


@pytest.mark.parametrize("case", CASES)
def test_two_workers_end_as_one_process(
    case: str, plain: dict[str, Any], two_workers: JobResult
) -> None:
    _check(case, plain, two_workers)


def test_three_workers_and_a_ps_task_end_as_one_process(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    case = "adam_functional_dataset"
    job = run_job(
        "equivalence.py", tmp_path, workers=3, ps=1, arguments={"plain": False, "only": case}
    )
    _check(case, plain, job)


def _check(case: str, plain: dict[str, Any], job: JobResult) -> None:
    expected = plain[case]
    job.common(case, "weights_sha256")
    for received in job.each(case):
        assert _difference(received["weights"], expected["weights"]) <= CASES[case]
        assert _difference(received["optimizer"], expected["optimizer"]) <= CASES[case]
    history = job.common(case, "history")
    assert history.keys() == expected["history"].keys()
    for name, values in history.items():
        np.testing.assert_allclose(values, expected["history"][name], rtol=1e-5, err_msg=name)


def _difference(received: list, expected: list) -> float:
    pairs = zip(received, expected, strict=True)
    return max(float(np.max(np.abs(np.subtract(a, b)), initial=0)) for a, b in pairs)
