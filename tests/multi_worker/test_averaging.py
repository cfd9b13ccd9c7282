"""Model averaging: learners follow the pure rule, and the outside sees the central model."""

from collections.abc import Iterator
from typing import Any

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

BATCHES = 11


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {
        "alone": {"workers": 0, "arguments": {"case": "alone"}},
        "together": {"workers": 2, "arguments": {"case": "together", "learners": 2}},
        "on_devices": {"workers": 0, "arguments": {"case": "on_devices"}},
    }
    with Jobs("averaging.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def alone(jobs: Jobs) -> dict[str, Any]:
    return jobs["alone"].results[0]


@pytest.fixture(scope="module")
def together(jobs: Jobs) -> JobResult:
    return jobs["together"]


def test_one_learner_in_all_is_plain_keras_bit_for_bit(alone: dict[str, Any]) -> None:
    assert all(alone["alike_plain"])


def check_trajectory(found: dict[str, Any], learners: int) -> None:
    assert found["difference"] < 2e-5
    assert found["moved"] > 0.01
    # An epoch is one pass over the data, and Keras knows how many runs that is.
    runs = -(-BATCHES // learners)
    assert found["runs"] == 2 * runs and found["steps"] == runs
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("case", "learners"),
    [("two", 2), ("adam", 3), ("accumulating", 3), ("scaled", 3), ("dropping", 3),
     ("period", 3), ("weak", 2)],
)  # fmt: skip
def test_learners_follow_the_rule(alone: dict[str, Any], case: str, learners: int) -> None:
    check_trajectory(alone[case], learners)
    assert alone[case]["iterations"] == alone[case]["runs"]


def test_learners_on_several_devices_follow_the_rule(jobs: Jobs) -> None:
    found = jobs["on_devices"].results[0]
    assert found["learners"] == 4
    check_trajectory(found, 4)


def check_central(found: dict[str, Any]) -> None:
    for way in ("get_weights", "save", "checkpoint", "restored"):
        assert found[way] == 0.0, way
    assert found["evaluate"] < 1e-5 and found["predict"] < 1e-5
    # Learners are elsewhere, and looking at the model leaves them there.
    assert all(d > 1e-4 for d in found["apart"])
    assert found["apart_after_reading"] == found["apart"]
    assert all(d > 1e-4 for d in found["apart_again"])
    # What is written they take over.
    assert all(d == 0.0 for d in found["after_set_weights"] + found["after_restore"])
    assert found["stays"] == 0.0


def test_the_outside_sees_the_central_model(alone: dict[str, Any]) -> None:
    check_central(alone["central_only"])


def seen(found: dict[str, Any]) -> list[int]:
    return sorted(sum(found["seen"], []))


def test_two_learners_share_the_input(alone: dict[str, Any]) -> None:
    found = alone["given"]
    for name in ("arrays", "dataset"):
        assert found[name]["runs"] == 2 * 4
        # Two passes over 50 examples in runs of 16, the rest of the last run being the next pass.
        counts = [seen(found[name]).count(i) for i in range(50)]
        assert set(counts) <= {2, 3} and sum(counts) == 8 * 16
    assert seen(found["whole"]) == list(range(48)) and found["whole"]["runs"] == 3
    assert found["steps"]["runs"] == 6
    # The rest of input of unknown length is too short for a run.
    assert found["unknown"]["runs"] == 4
    assert all(len(batch) == 8 for batch in found["unknown"]["seen"])
    assert seen(found["train_on_batch"]) == list(range(8))
    for name in ("arrays", "dataset", "whole", "steps"):
        assert found[name]["warnings"] == []


@pytest.mark.parametrize("kind", ["graph", "eager"])
def test_custom_loops_follow_the_rule(alone: dict[str, Any], kind: str) -> None:
    found = alone["loops"][kind]
    assert found["difference"] < 2e-5 and found["runs"] == 6
    assert found["losses"][-1] < found["losses"][0]


def test_statistics_are_the_mean_of_the_learners(alone: dict[str, Any]) -> None:
    assert alone["statistics"]["difference"] < 1e-5


def test_auto_tries_learners_and_trains_from_where_the_model_was(
    jobs: Jobs, alone: dict[str, Any]
) -> None:
    found = alone["tuned"]
    assert found["learners"] >= 1
    for trained in (found, found["again"]):
        check_trajectory(trained, found["learners"])
    log = jobs["alone"].logs["worker 0"]
    assert log.count("learners  examples/s") == 1
    assert log.count("<- kept") == 1


def test_arguments_that_cannot_be_are_refused(alone: dict[str, Any]) -> None:
    said = alone["refusals"]
    for name, text in {
        "no_learners": "learners_per_device=0",
        "word": "learners_per_device='many'",
        "no_correction": "correction=0.0",
        "momentum": "central_momentum=1.0",
        "period": "period=0",
        "unstable": "2 / (k + 1) = 0.4",
    }.items():
        assert text in said[name]
    assert said["count"] == "1"


@pytest.mark.parametrize("case", ["trajectory", "adam"])
def test_two_workers_with_two_learners_follow_the_rule(together: JobResult, case: str) -> None:
    for found in together.each(case):
        check_trajectory(found, 4)
    together.common(case, "weights_sha256")


def test_each_worker_sees_the_central_model(together: JobResult) -> None:
    for found in together.each("central_only"):
        check_central(found)


def test_statistics_of_workers_are_averaged_at_the_end_of_an_epoch(together: JobResult) -> None:
    for found in together.each("statistics"):
        assert found["difference"] < 1e-5
        assert found["at_the_end"] < 1e-5
    together.common("statistics", "logs")


def test_workers_share_the_input(together: JobResult) -> None:
    for name, runs in {"arrays": 4, "dataset": 4, "whole": 2, "steps": 6}.items():
        assert together.common("given", name, "runs") == runs
        assert together.common("given", name, "warnings") == []
    everything = [seen(found) for found in together.each("given", "arrays")]
    counts = [sum(everything, []).count(i) for i in range(50)]
    assert sum(counts) == 4 * 4 * 8 and min(counts) >= 2
    assert together.common("given", "unknown", "runs") >= 2
    batches = together.each("given", "train_on_batch")
    assert sorted(sum(map(seen, batches), [])) == list(range(8))


@pytest.mark.parametrize("kind", ["graph", "eager"])
def test_custom_loops_of_workers_follow_the_rule(together: JobResult, kind: str) -> None:
    for found in together.each("loops", kind):
        assert found["difference"] < 2e-5 and found["runs"] == 3


def test_no_worker_was_late(together: JobResult) -> None:
    rounds = together.common("report", "rounds")
    for worker in together.common("report", "workers"):
        assert worker["contributed"] == rounds
