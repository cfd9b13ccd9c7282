"""Contributions that are not finite are kept out of the rounds, or end their worker."""

from collections.abc import Iterator

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

# As in the program.
STEPS = 12
SOME = [0, 4, 0]
ALL = [2, 3, 3]
CASES = ["some", "all", "eager", "accumulation", "scaled"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {
        f"drop_{b}": {"workers": 3, "arguments": {"backup_workers": b, "nonfinite": "drop"}}
        for b in (0, 1)
    }
    wanted["error"] = {
        "workers": 3,
        "arguments": {"backup_workers": 0, "nonfinite": "error"},
        "statuses": {"worker 1": 1},
    }
    with Jobs("nonfinite.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.mark.parametrize("backup_workers", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_weights_stay_finite_and_equal(jobs: Jobs, case: str, backup_workers: int) -> None:
    job = jobs[f"drop_{backup_workers}"]
    job.common(case, "weights_sha256")
    assert job.common(case, "finite")
    assert job.common(case, "moved") > 1e-3
    for result in job.each(case):
        assert result["contributed"] + result["late"] + result["replayed"] == result["rounds"]


@pytest.mark.parametrize(
    "case, updates, nonfinite",
    [
        ("some", STEPS, SOME),
        ("all", STEPS, ALL),
        ("eager", STEPS, ALL),
        # Each of the two runs of an update spoils it: 0 and 1, 2 and 3, 4 and 5, 8 and 9.
        ("accumulation", STEPS // 2, [0, 4, 0]),
        ("scaled", STEPS - 4, [0, 0, 0]),
    ],
)
def test_what_is_kept_back_is_counted(
    jobs: Jobs, case: str, updates: int, nonfinite: list[int]
) -> None:
    job = jobs["drop_0"]
    assert job.common(case, "updates") == updates
    assert job.each(case, "nonfinite") == nonfinite
    if case != "scaled":
        assert job.each(case, "late") == nonfinite


def test_the_service_counts_alike_and_the_report_says_so(jobs: Jobs) -> None:
    job = jobs["drop_0"]
    totals = [sum(r[c]["nonfinite"] for c in CASES) for r in job.each()]
    for report in job.each("report"):
        assert [w["nonfinite"] for w in report["workers"]] == totals
    assert job.each("local", "nonfinite") == totals
    for text in job.each("report_text"):
        for worker, line in enumerate(text.splitlines()[1:]):
            assert f"kept back gradients with NaN or Inf in {totals[worker]}" in line


def test_an_error_names_the_variable_and_the_others_go_on(jobs: Jobs) -> None:
    job: JobResult = jobs["error"]
    assert sorted(job.results) == [0, 2]
    assert job.common("error", "rounds") == STEPS
    job.common("error", "weights_sha256")
    assert job.common("error", "finite")
    last = job.logs["worker 1"].strip().splitlines()[-1]
    assert "NonFiniteGradientError" in last
    assert "of exchange 0 in run 5 on worker 1" in last
    assert "that of 'embedding" in last
