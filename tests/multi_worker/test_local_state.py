"""State that training writes without an optimizer: statistics, and those of random generators."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

EPOCHS = 3
STEPS = 5
AVERAGED = ["batch_norm", "eager_batch_norm", "own_layer"]
NOISES = [
    "dropout",
    "seeded_dropout",
    "keras_generator",
    "tf_generator",
    "tf_dropout",
    "tf_random",
    "tf_random_seeded",
    "eager_dropout",
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    all_needed = {"plain": False, "backup_workers": 0, "pause_seconds": 0.0}
    one_slow = {"plain": False, "backup_workers": 1, "pause_seconds": 0.3}
    wanted = {
        "all_needed": {"workers": 2, "arguments": all_needed},
        "one_slow": {"workers": 3, "arguments": one_slow},
        "plain": {"workers": 0, "arguments": {"plain": True, "backup_workers": 0}},
    }
    with Jobs("local_state.py", tmp_path_factory, wanted) as started:
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


@pytest.mark.parametrize("case", AVERAGED)
def test_statistics_are_averaged_after_each_epoch(case: str, all_needed: JobResult) -> None:
    assert all_needed.common(case, "computed") == [STEPS] * EPOCHS
    _check_averages(case, all_needed, averaged=(0, 1))


@pytest.mark.parametrize("case", AVERAGED)
def test_averages_weigh_the_runs_that_a_worker_has_computed(case: str, one_slow: JobResult) -> None:
    # Worker 1's statistics come last, and are left out.
    _check_averages(case, one_slow, averaged=(0, 2))


@pytest.mark.parametrize("case", ["batch_norm", "eager_batch_norm"])
def test_workers_compute_unequal_numbers_of_runs(case: str, one_slow: JobResult) -> None:
    """So that the weights matter; on a busy machine the one that pauses need not be the slowest."""
    first, _, pausing = (sum(c) for c in one_slow.each(case, "computed"))
    assert first > 0 and pausing > 0 and first != pausing


def test_who_has_state_of_its_own_computes_every_run(one_slow: JobResult) -> None:
    # Nothing but its own inputs tells a layer's state, so runs that are over are executed as well.
    assert one_slow.each("own_layer", "computed") == [[STEPS] * EPOCHS] * 3
    notices = [
        line
        for line in one_slow.logs["worker 2"].splitlines()
        if "executes the whole training function" in line
    ]
    assert len(notices) == 1
    assert "largest_input" in notices[0]


@pytest.mark.parametrize("case", AVERAGED)
def test_averages_follow_the_data(case: str, all_needed: JobResult) -> None:
    start = all_needed.common(case, "start")
    (*_, last) = all_needed.common(case, "after")
    for before, after in zip(start, last, strict=True):
        assert np.all(np.abs(np.subtract(after, before)) > 1e-3)


@pytest.mark.parametrize("kind", NOISES)
def test_random_numbers_differ_between_workers_and_runs(kind: str, all_needed: JobResult) -> None:
    all_needed.common("noise", kind, "weights_sha256")
    # Before and after the weights of worker 0, seeds among them, were loaded.
    for part in ("first", "second"):
        seen = all_needed.each("noise", kind, part)
        assert [len(runs) for runs in seen] == [STEPS] * 2
        every = [run for runs in seen for run in runs]
        assert all(a != b for a, b in itertools.combinations(every, 2))


@pytest.mark.parametrize("kind", NOISES)
def test_initial_weights_are_those_of_one_process(
    kind: str, all_needed: JobResult, plain: dict[str, Any]
) -> None:
    assert all_needed.common("noise", kind, "initial") == plain["noise"][kind]["initial"]


# TensorFlow's generators have a stream for each replica of a strategy, also with one replica.
@pytest.mark.parametrize("kind", [n for n in NOISES if n != "tf_generator"])
def test_worker_0_has_the_random_numbers_of_one_process(
    kind: str, all_needed: JobResult, plain: dict[str, Any]
) -> None:
    assert all_needed.results[0]["noise"][kind]["first"] == plain["noise"][kind]["first"]


def test_synchronized_statistics_are_those_of_whole_batches(
    all_needed: JobResult, plain: dict[str, Any]
) -> None:
    expected = plain["synchronized"]
    all_needed.common("synchronized", "variables_sha256")
    # Sums of two halves differ from the sum of a whole in the last bits of a float32.
    for received in all_needed.each("synchronized", "weights"):
        for a, b in zip(received, expected["weights"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    history = all_needed.common("synchronized", "history")
    np.testing.assert_allclose(history["loss"], expected["history"]["loss"], rtol=1e-5)


def test_synchronized_statistics_need_all_workers(one_slow: JobResult) -> None:
    error = one_slow.common("synchronized_error")
    assert error.startswith("Expected no exchange between workers inside of what is differentiated")
    assert "Received: for instance BatchNormalization(synchronized=True)" in error
    assert "Leave `synchronized` out, or use backup_workers=0, and no `cutoff`." in error


def test_a_model_that_is_refused_leaves_the_strategy_as_it_was(one_slow: JobResult) -> None:
    one_slow.common("afterwards", "variables_sha256")
    assert np.all(np.isfinite(one_slow.common("afterwards", "history")["loss"]))


def _check_averages(case: str, job: JobResult, averaged: tuple[int, ...]) -> None:
    job.common(case, "weights_sha256")
    names = job.common(case, "statistics")
    after = job.common(case, "after")
    workers = [job.results[w][case] for w in averaged]
    for epoch in range(EPOCHS):
        weights = [w["computed"][epoch] for w in workers]
        for number, name in enumerate(names):
            values = [w["before"][epoch][number] for w in workers]
            # Averages are made in float64, and kept in float32.
            np.testing.assert_allclose(
                after[epoch][number],
                np.average(values, axis=0, weights=weights),
                rtol=1e-6,
                err_msg=f"{name} after epoch {epoch}",
            )
            assert not np.allclose(values[0], values[1], rtol=1e-3)
