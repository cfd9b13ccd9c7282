"""Gradients that travel by priority, and updates that wait for the next run, change no bit."""

from collections.abc import Iterator
from typing import Any

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

STEPS = 24
# Large enough that neighbours share some, and small enough that weights are cut.
PRIORITY = {"slice_elements": 20, "credit_bytes": 64}
SAID = "the update of a training function is made at its end, not in the next run: "

# How often there is a look at whether an update waits.
DEFERRED = {
    "schedule_sgd": STEPS,
    "rate_adam": STEPS,
    "adamw": STEPS,
    "executions": STEPS // 4,
    "loop": STEPS,
    "graph_loop": 2,
}
# `train_on_batch` returns with the update made.
NOT_DEFERRED = {
    "batches": None,
    "scaled": "it has several exchanges",
    "adversaries": "it has several exchanges",
    "accumulation": "its update is in a condition, a loop or a function of its own",
    "average": "it uses the variable 'adam_",
    "eager": None,
}
ALL = [*DEFERRED, *NOT_DEFERRED]

# Over a network, with two services, in the order of the workers, with narrow values.
OTHERWISE = {"transport": "grpc", "deterministic": True, "compression": "float16"}
SOME = ["rate_adam", "executions"]
LATE = ["adamw", "executions", "graph_loop"]


def arguments(priority: dict[str, int] | None, **more: Any) -> dict[str, Any]:
    return {"arguments": {"priority": priority, **more}}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    otherwise = {"strategy": OTHERWISE, "only": SOME}
    late = {"strategy": {"backup_workers": 1}, "only": LATE, "pause_seconds": 0.05}
    wanted = {
        "fifo": {"workers": 2, **arguments(None)},
        "priority": {"workers": 2, **arguments(PRIORITY)},
        "fifo_otherwise": {"workers": 3, "ps": 2, **arguments(None, **otherwise)},
        "priority_otherwise": {"workers": 3, "ps": 2, **arguments(PRIORITY, **otherwise)},
        "late": {"workers": 3, **arguments(PRIORITY, **late)},
    }
    with Jobs("propagation.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.mark.parametrize("case", ALL)
def test_priorities_change_no_bit(case: str, jobs: Jobs) -> None:
    _check_equal(jobs["fifo"], jobs["priority"], case)


@pytest.mark.parametrize("case", SOME)
def test_nor_over_a_network_with_two_services_in_order_and_narrow_values(
    case: str, jobs: Jobs
) -> None:
    _check_equal(jobs["fifo_otherwise"], jobs["priority_otherwise"], case)
    # What is sent is rounded, so it is not what two workers would make of it in float32.
    other = jobs["fifo"].common(case, "weights_sha256")
    assert jobs["fifo_otherwise"].common(case, "weights_sha256") != other


@pytest.mark.parametrize("case", ALL)
def test_a_state_has_what_optimizers_hold(case: str, jobs: Jobs) -> None:
    """Also where the function that is traced for a run does not use it."""
    assert jobs["fifo"].common(case, "common") == jobs["priority"].common(case, "common")


@pytest.mark.parametrize("case", ALL)
def test_updates_wait_for_the_next_run_where_that_can_be(case: str, jobs: Jobs) -> None:
    for name in ("fifo", "priority"):
        looks = jobs[name].common(case, "looks")
        waited = jobs[name].common(case, "waited")
        assert waited == (DEFERRED.get(case, 0) if name == "priority" else 0)
        assert looks == DEFERRED.get(case, STEPS)


def test_where_an_update_cannot_wait_the_user_is_told_once_why(jobs: Jobs) -> None:
    said = _said(jobs["priority"])
    assert said.keys() == set(ALL)
    reasons = [why for why in NOT_DEFERRED.values() if why is not None]
    for case, lines in said.items():
        why = NOT_DEFERRED.get(case)
        # What was said for another training function is not said again.
        is_new = why is not None and reasons.index(why) == _told_before(case)
        assert len(lines) == is_new, lines
        assert all(line.startswith(SAID + why) for line in lines)
    for name in ("fifo", "priority_otherwise", "late"):
        lines = [line for lines in _said(jobs[name]).values() for line in lines]
        assert not lines
    assert SAID not in jobs["priority"].logs["worker 1"]


def test_what_the_forward_pass_uses_first_has_the_first_priority(jobs: Jobs) -> None:
    """And not what was made first; a layer that is used twice counts where it is used first."""
    assert jobs["priority"].common("adamw", "first_uses") == {
        "first/kernel": 0,
        "first/bias": 1,
        "twice/kernel": 2,
        "twice/bias": 3,
        "last/kernel": 4,
        "last/bias": 5,
    }
    embedding, *others = jobs["priority"].common("rate_adam", "first_uses").items()
    assert embedding == ("embedding/embeddings", 0)
    assert sorted(use for _, use in others) == [1, 2, 3, 4]


@pytest.mark.parametrize("case", LATE)
def test_a_slow_worker_replays_and_all_end_alike(case: str, jobs: Jobs) -> None:
    job = jobs["late"]
    for name in ("weights_sha256", "optimizer_sha256", "iterations", "rounds"):
        job.common(case, name)
    assert job.common(case, "iterations") == STEPS
    assert job.results[2][case]["replayed"] > 0


def _check_equal(fifo: JobResult, priority: JobResult, case: str) -> None:
    for name in ("weights_sha256", "optimizer_sha256", "iterations"):
        assert fifo.common(case, name) == priority.common(case, name), name
    # Statistics of batches are a worker's own before the end of an epoch.
    assert fifo.each(case, "others_sha256") == priority.each(case, "others_sha256")
    for job in (fifo, priority):
        assert job.common(case, "moved") > 1e-2
        assert not job.results[0][case]["replayed"]
        assert "takes over" not in "\n".join(job.logs.values())


def _said(job: JobResult) -> dict[str, list[str]]:
    """Returns what worker 0 has said of deferred updates, by the case in which it did."""
    said: dict[str, list[str]] = {}
    for line in job.logs["worker 0"].splitlines():
        mark, _, text = line.partition(": ")
        if mark == "begins":
            case = text
            said[case] = []
        elif mark == "tf_syncdist" and SAID in text:
            said[case].append(text)
    return said


def _told_before(case: str) -> int:
    """Returns how many of the cases with a reason come before one."""
    return [c for c, why in NOT_DEFERRED.items() if why is not None].index(case)
