"""Values of several replicas are a worker's own; metrics and statistics can be made common."""

from collections.abc import Iterator

import numpy as np
import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

WORKERS = 2
STEPS = 4


SHAPES = {f"{d}_devices-backup_{b}": (d, b) for d, b in [(1, 0), (2, 0), (1, 1), (2, 1)]}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {
        name: {"workers": WORKERS, "arguments": {"devices": d, "backup_workers": b}}
        for name, (d, b) in SHAPES.items()
    }
    with Jobs("values.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def job(shape: tuple[int, int], jobs: Jobs) -> JobResult:
    return jobs["{}_devices-backup_{}".format(*shape)]


def test_workers_know_who_they_are(job: JobResult, shape: tuple[int, int]) -> None:
    devices, backup_workers = shape
    for index, found in enumerate(job.each("identity")):
        assert found["num_replicas_in_sync"] == (WORKERS - backup_workers) * devices
        assert (found["num_workers"], found["worker_index"]) == (WORKERS, index)
        assert found["is_chief"] == (index == 0)
        assert found["resolver_is_kept"]
        assert found["resolver_task"] == ["worker", index]


def test_replicas_have_ids_of_their_own_in_the_job(job: JobResult, shape: tuple[int, int]) -> None:
    devices, _ = shape
    for index, found in enumerate(job.each("identity")):
        own = list(range(index * devices, (index + 1) * devices))
        assert found["ids_eagerly"] == found["ids_in_function"] == own
        # Those of backup workers are counted here, so that ids are below their number.
        assert found["contexts"] == [[i, WORKERS * devices] for i in own]
        assert found["distributed"] == [10 * i for i in own]
        assert found["passed_through"] == [10 * i + 1 for i in own]


def test_gather_and_reduce_are_of_one_worker(job: JobResult, shape: tuple[int, int]) -> None:
    devices, _ = shape
    for index, found in enumerate(job.each("combined")):
        own = [float(i + 1) for i in range(index * devices, (index + 1) * devices)]
        rows = [[v, v] for v in own for _ in range(int(v))]
        total, mean = sum(own), sum(own) / devices
        assert found["gathered"] == rows
        assert (found["sum"], found["mean"]) == (total, mean)
        assert found["sum_of_axis"] == np.sum(rows, axis=0).tolist()
        # A mean along an axis is over all rows, whichever replica has them.
        assert found["mean_of_axis"] == pytest.approx(np.mean(rows, axis=0))
        assert found["sum_of_nest"] == {"a": total, "b": [total, [total]]}
        assert found["mean_of_nest_and_axis"]["a"] == pytest.approx(np.mean(rows, axis=0))
        gathered, mean_of_axis, reduced = found["in_function"]
        assert gathered == rows
        assert mean_of_axis == pytest.approx(np.mean(rows, axis=0))
        assert reduced == total


def test_none_of_that_is_a_training_run(job: JobResult, shape: tuple[int, int]) -> None:
    assert job.common("rounds") == (0 if shape[1] else STEPS + 2)


def test_synchronize_makes_metrics_those_of_all_workers(
    job: JobResult, shape: tuple[int, int]
) -> None:
    if shape[1]:
        assert all("synchronised" not in r for r in job.results.values())
        return
    before = job.each("synchronised", "before")
    mean, largest = job.common("synchronised", "read")
    assert mean == pytest.approx(_total(before, "total") / _total(before, "count"), rel=1e-6)
    assert largest == pytest.approx(_total(before, "sum"), rel=1e-6)
    # They are different numbers on the workers alone, and theirs still afterwards.
    assert before[0]["total"] != before[1]["total"]
    for old, new in zip(before, job.each("synchronised", "after"), strict=True):
        assert all(old[name] == new[name] for name in ("total", "count", "sum"))
    assert job.common("synchronised", "read_again") == [mean, largest]
    assert job.common("synchronised", "read_reset") == [0.0, 0.0]
    second = job.each("synchronised", "second")
    mean, largest = job.common("synchronised", "read_second")
    assert mean == pytest.approx(_total(second, "total") / _total(second, "count"), rel=1e-6)
    assert largest == pytest.approx(_total(second, "sum"), rel=1e-6)


def test_synchronize_averages_statistics(job: JobResult, shape: tuple[int, int]) -> None:
    if shape[1]:
        return
    before = job.each("synchronised", "before")
    job.common("synchronised", "statistics_sha256")
    job.common("synchronised", "weights_sha256")
    for name in ("mean", "variance"):
        assert before[0][name] != before[1][name]
        copies = [copy for held in before for copy in held[name]]
        for copy in sum(job.each("synchronised", "after", name), []):
            np.testing.assert_allclose(copy, np.mean(copies, axis=0), rtol=1e-6, atol=1e-7)


def _total(held: list[dict], name: str) -> float:
    return sum(sum(worker[name]) for worker in held)
