"""Workers skip an update together if the scaled gradients of one of those in the round overflow."""

from collections.abc import Iterator

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

# As in the program.
STEPS = 16
GROWTH_STEPS = 4
INITIAL_SCALE = 2.0**10
SOME = (2, 5, 6, 13)
LATE = ["slow", "between", "between_eager", "between_accumulation"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {f"backup_{b}": {"workers": 2, "arguments": {"backup_workers": b}} for b in (0, 1)}
    with Jobs("overflow.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def all_needed(jobs: Jobs) -> JobResult:
    return jobs["backup_0"]


@pytest.fixture(scope="module")
def one_slow(jobs: Jobs) -> JobResult:
    return jobs["backup_1"]


@pytest.mark.parametrize("case", ["graph", "eager", "accumulation", "never"])
def test_all_skip_the_updates_in_which_one_worker_overflows(
    case: str, all_needed: JobResult
) -> None:
    overflows = () if case == "never" else SOME
    # A list for each run: the scale, the runs since it has changed, the updates.
    expected = _scales(overflows, runs_per_update=2 if case == "accumulation" else 1)
    assert all_needed.common(case, "seen") == expected
    all_needed.common(case, "weights_sha256")
    all_needed.common(case, "optimizer_sha256")
    assert all_needed.common(case, "finite")
    assert all_needed.common(case, "moved") > 1e-3


def test_the_scale_grows_again(all_needed: JobResult) -> None:
    scales = [scale for scale, _, _ in all_needed.common("graph", "seen")]
    assert any(later > before for before, later in zip(scales, scales[1:], strict=False))
    assert all_needed.common("never", "seen")[-1][0] == INITIAL_SCALE * 2.0 ** (
        STEPS // GROWTH_STEPS
    )


@pytest.mark.parametrize("case", LATE)
def test_what_comes_too_late_neither_skips_an_update_nor_spoils_it(
    case: str, one_slow: JobResult
) -> None:
    one_slow.common(case, "weights_sha256")
    one_slow.common(case, "optimizer_sha256")
    assert one_slow.common(case, "finite")
    assert one_slow.common(case, "moved") > 1e-3
    assert one_slow.common(case, "rounds") == STEPS


@pytest.mark.parametrize("case", ["slow", "between", "between_eager"])
def test_only_what_is_in_a_round_skips_its_update(case: str, one_slow: JobResult) -> None:
    # Worker 1 overflows in each of its runs. A machine that is busy may let it come first in one.
    in_rounds = one_slow.results[1][case]["contributed"]
    assert in_rounds < STEPS / 2
    scale, _, updates = one_slow.common(case, "seen")[-1]
    assert updates == STEPS - in_rounds
    if not in_rounds:
        assert scale == INITIAL_SCALE * 2.0 ** (STEPS // GROWTH_STEPS)


def test_a_slow_worker_replays_updates_with_scaled_losses(one_slow: JobResult) -> None:
    assert one_slow.results[1]["slow"]["replayed"] > STEPS / 2


def test_no_worker_executes_the_whole_function_or_is_mended(
    all_needed: JobResult, one_slow: JobResult
) -> None:
    for job in (all_needed, one_slow):
        for task, log in job.logs.items():
            assert "executes the whole training function" not in log, task
            assert "takes over" not in log, task


def _scales(overflows: tuple[int, ...], runs_per_update: int) -> list[list[float]]:
    scale, since, taken, seen = INITIAL_SCALE, 0, 0, []
    for run in range(STEPS):
        if run in overflows:
            scale, since = scale / 2, 0
        else:
            taken += 1
            since += 1
            if since == GROWTH_STEPS:
                scale, since = scale * 2, 0
        seen.append([scale, float(since), float(taken // runs_per_update)])
    return seen
