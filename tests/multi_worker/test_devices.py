"""Several devices per worker: the same results as one process, on every copy of every worker."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .harness import JobResult, Jobs, run_job

pytestmark = pytest.mark.timeout(560)

STEPS = 6
RUNS = {"whole": STEPS, "own": STEPS}  # All others are fits of two epochs.
SLOW = 1
# Gradients of parts of a batch are rounded before they are added. Adam divides by the root of
# small squares, which amplifies that, and what is computed in float16 is rounded to 11 bits.
TOLERANCES = {
    "sgd": 2e-6,
    "adam": 5e-5,
    "scaled": 2e-6,
    "float16": 5e-3,
    "whole": 2e-6,
    "own": 2e-6,
}
# The statistics of a part of a batch differ from those of the whole, and so do random numbers. And
# the gradients of a part are smaller, so that they overflow at another scale.
ONLY_ALIKE = ("normalised", "dropout", "overflows")
CASES = (*TOLERANCES, *ONLY_ALIKE)
# With four devices a job spends its time on traces, so only what differs most is tried.
FEW = ("sgd", "normalised", "overflows", "whole", "own")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    late = {"plain": False, "devices": 2, "backup_workers": 1, "pause_seconds": 0.1}
    wanted = {
        "plain": {"workers": 0, "arguments": {"plain": True, "devices": 1}},
        "2": {"workers": 2, "arguments": {"plain": False, "devices": 2}},
        "slow": {"workers": 2, "arguments": late},
    }
    with Jobs("devices.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def plain(jobs: Jobs) -> dict[str, Any]:
    return jobs["plain"].results[0]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def devices(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def job(devices: int, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    if devices == 2:
        return jobs["2"]
    arguments = {"plain": False, "devices": devices, "only": FEW}
    return run_job("devices.py", tmp_path_factory.mktemp("4"), workers=2, arguments=arguments)


@pytest.fixture(scope="module")
def slow(jobs: Jobs) -> JobResult:
    return jobs["slow"]


@pytest.mark.parametrize("case", CASES)
def test_all_devices_of_all_workers_end_alike(job: JobResult, devices: int, case: str) -> None:
    if _left_out(case, devices):
        return
    _check_alike(job, devices, case)
    for received in job.each(case):
        assert received["contributed"] == received["rounds"] == RUNS.get(case, 2 * STEPS)


@pytest.mark.parametrize("case", TOLERANCES)
def test_the_result_is_that_of_one_process(
    job: JobResult, devices: int, plain: dict[str, Any], case: str
) -> None:
    if _left_out(case, devices):
        return
    for received in job.each(case):
        for value, expected in zip(received["weights"], plain[case]["weights"], strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCES[case])


@pytest.mark.parametrize("case", ["sgd", "adam", "scaled", "float16"])
def test_the_logs_are_those_of_one_process(
    job: JobResult, devices: int, plain: dict[str, Any], case: str
) -> None:
    if _left_out(case, devices):
        return
    history = job.common(case, "history")
    expected = plain[case]["history"]
    assert history.keys() == expected.keys()
    # One example more or less is 1 / 192 of the accuracy.
    near = {"rtol": 1e-5, "atol": 1e-6} if case != "float16" else {"rtol": 0.01, "atol": 0.006}
    for name, values in history.items():
        np.testing.assert_allclose(values, expected[name], err_msg=name, **near)


@pytest.mark.parametrize("case", ["scaled", "float16"])
def test_the_loss_scale_is_that_of_one_process(
    job: JobResult, devices: int, plain: dict[str, Any], case: str
) -> None:
    if _left_out(case, devices):
        return
    assert job.common(case, "scale") == plain[case]["scale"]


def test_all_workers_skip_an_update_that_overflows(job: JobResult, slow: JobResult) -> None:
    assert job.common("overflows", "scale") < 2.0**24
    assert slow.common("overflows", "scale") < 2.0**24


def test_batches_are_cut_into_as_many_parts_as_there_are_replicas(job: JobResult) -> None:
    for case in ("whole", "own"):
        # Sums over the devices of a worker.
        assert job.common(case, "examples") == [16] * STEPS


def test_metrics_of_a_loop_are_those_of_one_process(job: JobResult, plain: dict[str, Any]) -> None:
    for case in ("whole", "own"):
        assert job.common(case, "accuracy") == pytest.approx(plain[case]["accuracy"], abs=1e-6)


def test_each_worker_evaluates_and_predicts_everything(job: JobResult) -> None:
    for received in job.each("sgd"):
        assert received["evaluated"]["loss"] == pytest.approx(received["computed_loss"], rel=1e-5)
        np.testing.assert_allclose(received["predicted"], received["computed"], atol=1e-5)


def test_what_several_devices_cannot_do_is_refused(job: JobResult, devices: int) -> None:
    for name in ("accumulation", "ema"):
        for refused in job.each("refused"):
            message = refused[name]
            assert "Expected one device per worker" in message
            assert "`gradient_accumulation_steps` or `ema_overwrite_frequency`" in message
            assert f"Received: {devices} devices" in message
            assert "Start one worker per device, or leave the option out" in message


@pytest.mark.parametrize("case", CASES)
def test_a_slow_worker_ends_with_the_same_bits(slow: JobResult, case: str) -> None:
    _check_alike(slow, 2, case)
    for received in slow.each(case):
        assert (
            received["contributed"] + received["late"] + received["replayed"]
            == (received["rounds"])
        )
        assert received["rounds"] == RUNS.get(case, 2 * STEPS)
    assert slow.results[SLOW][case]["replayed"] > 0


def test_a_slow_worker_replays(slow: JobResult) -> None:
    assert not any("executes the whole" in log for log in slow.logs.values())


def _check_alike(job: JobResult, devices: int, case: str) -> None:
    job.common(case, "weights_sha256")
    job.common(case, "optimizer_sha256")
    if case not in RUNS:
        job.common(case, "statistics_sha256")
        job.common(case, "history")
    for received in job.each(case):
        assert received["devices_alike"]
        assert received["copies"] == [devices]


def _left_out(case: str, devices: int) -> bool:
    return devices == 4 and case not in FEW
