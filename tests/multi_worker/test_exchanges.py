"""Several exchanges in a run and updates by hand: nothing is left out where a round is over."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

STEPS = 6
SLOW = 1
NOTICE = "executes the whole training function"

# What a worker says where it cannot replay; `None` where it replays, and has nothing to say.
OTHERWISE = "its exchanges are not one after the other inside of the same Keras optimizers"
WRITES = "it writes the variable "
EAGER = "it runs without a graph"
CASES = {
    "gan-fit": None,
    "gan-in_function": None,
    "gan-around_function": None,
    "gan-eagerly": EAGER,
    "many_critics-fit": None,
    "many_critics-around_function": None,
    "many_critics_in_while-fit": OTHERWISE,
    "many_critics_in_while-around_function": OTHERWISE,
    "many_critics_in_autograph-in_function": OTHERWISE,
    "clipped-fit": WRITES,
    "clipped-eagerly": EAGER,
    "every_third-fit": OTHERWISE,
    "every_third-in_function": OTHERWISE,
    "by_hand-fit": OTHERWISE,
    "by_hand-in_function": OTHERWISE,
    "by_hand-eagerly": EAGER,
    "by_hand_and_optimizer-around_function": OTHERWISE,
    "frozen_teacher-fit": WRITES,
    "frozen_teacher-eagerly": EAGER,
    "teacher-fit": WRITES,
    "teacher-in_function": WRITES,
    "counting-fit": WRITES,
    "counting-around_function": WRITES,
    "counting-eagerly": EAGER,
    "spectral-fit": WRITES,
    "spectral-in_function": WRITES,
}
# These end with a smaller batch. Where that is traced for itself, it is a site of its own, in which
# a worker has no earlier outputs and computes.
NESTED_CASES = (
    "nested-fit",
    "nested-in_function",
    "nested-around_function",
    "nested-eagerly",
    "nested-eagerly_anew",
    "nested_by_shape-in_function",
)
ALL_CASES = (*CASES, *NESTED_CASES)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    late = {"plain": False, "backup_workers": 1, "slow": True}
    wanted = {
        "plain": {"workers": 0, "arguments": {"plain": True}},
        "together": {"workers": 2, "arguments": {"plain": False}},
        "slow": {"workers": 2, "arguments": late},
    }
    with Jobs("exchanges.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def plain(jobs: Jobs) -> dict[str, Any]:
    return jobs["plain"].results[0]


@pytest.fixture(scope="module")
def together(jobs: Jobs) -> JobResult:
    return jobs["together"]


@pytest.fixture(scope="module")
def slow(jobs: Jobs) -> JobResult:
    return jobs["slow"]


def test_every_case_is_looked_at(
    plain: dict[str, Any], together: JobResult, slow: JobResult
) -> None:
    for results in (plain, *together.results.values(), *slow.results.values()):
        assert set(results) == set(ALL_CASES)


@pytest.mark.parametrize("case", ALL_CASES)
def test_workers_end_with_the_same_bits(slow: JobResult, case: str) -> None:
    slow.common(case, "everything_sha256")
    for received in slow.each(case):
        assert received["rounds"] == STEPS
        assert received["contributed"] + received["late"] + received["replayed"] == STEPS
    received = slow.results[SLOW][case]
    assert received["late"] + received["replayed"] > 0
    # Where each run is of another function, a worker never has earlier outputs.
    assert (received["replayed"] > 0) == (case != "nested-eagerly_anew")


@pytest.mark.parametrize("case", CASES)
def test_the_whole_function_is_executed_where_it_must_be(slow: JobResult, case: str) -> None:
    reason = CASES[case]
    notices = _notices(slow, SLOW, case)
    assert len(notices) == (reason is not None), notices
    assert all(f"because {reason}" in n for n in notices)
    # The other worker is seldom behind, and then says the same.
    others = _notices(slow, 0, case)
    assert len(others) <= len(notices)


@pytest.mark.parametrize("case", NESTED_CASES)
def test_every_trace_says_it_once(slow: JobResult, case: str) -> None:
    for worker in slow.results:
        # A whole batch and a smaller one.
        assert len(_notices(slow, worker, case)) <= 2


@pytest.mark.parametrize("case", ALL_CASES)
def test_all_workers_together_end_as_one_process(
    plain: dict[str, Any], together: JobResult, case: str
) -> None:
    together.common(case, "everything_sha256")
    for received in together.each(case):
        assert received["contributed"] == received["rounds"] == STEPS
        for value, expected in zip(received["values"], plain[case]["values"], strict=True):
            # Gradients of halves of a batch are rounded before they are added, and up to six
            # updates of values around 1 amplify that.
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-6)


def test_nobody_speaks_where_nobody_is_late(together: JobResult) -> None:
    assert not any(NOTICE in log for log in together.logs.values())


def test_cases_differ_in_what_they_end_with(plain: dict[str, Any]) -> None:
    """What a case does besides has an effect, so that leaving it out would be seen."""
    for one, other in (("gan", "clipped"), ("gan", "many_critics"), ("gan", "every_third")):
        a, b = (np.concatenate([np.ravel(v) for v in _values(plain, c)[:8]]) for c in (one, other))
        assert np.max(np.abs(a - b)) > 0.01
    for critic in _values(plain, "clipped")[4:8]:
        assert np.max(np.abs(critic)) <= np.float32(0.2)
    # The counter and the critic's iterations, and those of the generator.
    assert _values(plain, "every_third").count(STEPS) == 2
    assert _values(plain, "every_third").count(STEPS / 3) == 1
    assert _values(plain, "counting").count(STEPS) >= 1


def _values(plain: dict[str, Any], case: str) -> list[Any]:
    return plain[f"{case}-fit"]["values"]


def _notices(job: JobResult, worker: int, case: str) -> list[str]:
    log = job.logs[f"worker {worker}"]
    section = log.partition(f"== {case}\n")[2].partition("== ")[0]
    return [line for line in section.splitlines() if NOTICE in line]


def test_logs_are_cut_into_cases(slow: JobResult) -> None:
    for log in slow.logs.values():
        assert [i[3:] for i in log.splitlines() if i.startswith("== ")] == [*ALL_CASES, "end"]
