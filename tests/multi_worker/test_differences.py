"""A worker whose variables have come to differ is found, named and mended."""

import re
from collections.abc import Iterator

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

# Case: the variable that is changed by hand.
CHANGED = {
    "kernel_of_1": "model/first/kernel",
    "kernel_of_0": "model/first/kernel",
    "slot_of_1": "first_kernel_momentum",
    "slot_of_0": "first_kernel_momentum",
    "last_epoch": "model/first/kernel",
    "loop_of_1": "model/first/kernel",
    "loop_of_0": "model/first/kernel",
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {
        "all_needed": {"workers": 2, "arguments": {"backup_workers": 0}},
        "one_slow": {"workers": 2, "arguments": {"backup_workers": 1, "pause_seconds": 0.05}},
    }
    with Jobs("differences.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def all_needed(jobs: Jobs) -> JobResult:
    return jobs["all_needed"]


@pytest.fixture(scope="module")
def one_slow(jobs: Jobs) -> JobResult:
    return jobs["one_slow"]


def _notices(job: JobResult, case: str) -> list[tuple[int, int, str]]:
    """Returns who has printed that it differs from whom, and in what, while a case ran."""
    found = []
    for worker in (0, 1):
        part = re.split(r"^case ", job.logs[f"worker {worker}"], flags=re.MULTILINE)
        (lines,) = [p for p in part if p.startswith(f"{case}\n")]
        for match in re.finditer(r"worker (\d) differs from worker (\d) in '([^']*)'", lines):
            assert int(match[1]) == worker
            found.append((worker, int(match[2]), match[3]))
    return found


@pytest.mark.parametrize("case", CHANGED)
def test_worker_0_is_right_if_all_are_needed(case: str, all_needed: JobResult) -> None:
    ((who, whom, variable),) = _notices(all_needed, case)
    assert (who, whom) == (1, 0)
    assert variable.endswith(CHANGED[case])
    if case != "last_epoch":
        # After the epoch in which it was changed all is well again.
        all_needed.common(case, "second")
    all_needed.common(case, "weights_sha256")
    all_needed.common(case, "optimizer_sha256")
    if "slot" not in case:
        # Weights begin below 1, and 3 was added on one worker.
        assert (all_needed.common(case, "largest") > 2) == case.endswith("_of_0")


@pytest.mark.parametrize("case", CHANGED)
def test_a_slow_worker_is_mended_or_followed(case: str, one_slow: JobResult) -> None:
    # Who is the first at the end of the epoch is right, also if it was the one that was changed.
    ((who, whom, variable),) = _notices(one_slow, case)
    assert {who, whom} == {0, 1}
    assert variable.endswith(CHANGED[case])
    one_slow.common(case, "weights_sha256")
    one_slow.common(case, "optimizer_sha256")


def test_nothing_is_said_if_nothing_differs(all_needed: JobResult, one_slow: JobResult) -> None:
    for job in (all_needed, one_slow):
        assert _notices(job, "nobody") == []
        job.common("nobody", "weights_sha256")
