"""Mistakes end in an error that tells what to do, at once and on every worker."""

import re
from pathlib import Path
from typing import Any

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(260)

# Mistake: the kind of its error, and what the message has to say.
MISTAKES = {
    "backup_workers_2_of_2": ("ValueError", r"backup_workers.*Received: .*2"),
    "backup_workers_3_of_2": ("ValueError", r"backup_workers.*Received: .*3"),
    "backup_workers_negative": ("ValueError", r"backup_workers.*Received: .*-1"),
    "backup_workers_and_cutoff": ("ValueError", r"backup_workers=1 and cutoff=FullSync"),
    "cutoff_unknown": ("ValueError", r"cutoff policy of tf_syncdist \(.*Elfving.*'elfving'"),
    "cutoff_in_order": ("ValueError", r"deterministic=True, Deadline.*backup_workers=0"),
    "trace_nowhere": ("FileNotFoundError", r"directory that exists.*nowhere/trace\.npz"),
    "model_nowhere": ("RunTimeModelError", r"'nowhere\.npz', which is not there"),
    "no_json": ("ClusterConfigError", r"TF_CONFIG to be JSON.*Received: '{cluster: worker}'"),
    "index_not_in_cluster": ("ClusterConfigError", r"'worker': 2.*'worker', index 2"),
    "job_not_in_cluster": ("ClusterConfigError", r"'worker': 2.*'ps', index 0"),
    "beyond_loopback": ("ClusterConfigError", r"loopback.*192\.0\.2\.1:\d+.*insecure=True"),
    "ps_beyond_loopback": ("ClusterConfigError", r"loopback.*192\.0\.2\.1:\d+.*insecure=True"),
    "port_in_use": ("AggregatorUnreachableError", r"127\.0\.0\.1:\d+.*port in use"),
    "unreachable": ("AggregatorUnreachableError", r"127\.0\.0\.1:\d+ within 3 s"),
    "jit_compile": ("ValueError", r"jit_compile=True.*jit_compile=False"),
    "batch_of_arrays": ("ValueError", r"divisible by N.*batch_size=33 with N=2.*Use 32 or 34"),
    "batch_of_dataset": ("ValueError", r"divisible by N.*batch_size=33 with N=2.*Use 32 or 34"),
    "batch_of_loop": ("ValueError", r"divisible by N.*batch_size=33 with N=2.*Use 32 or 34"),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    directory = tmp_path_factory.mktemp("mistakes")
    return run_job(
        "mistakes.py", directory, workers=2, start=["worker 0"], statuses={"worker 0": 1}
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(job: JobResult, name: str) -> None:
    kind, pattern = MISTAKES[name]
    found: dict[str, Any] = job.results[0][name]
    assert kind in found["kinds"]
    assert re.search(pattern, found["message"]), found["message"]


def test_nothing_waits_for_what_cannot_come(job: JobResult) -> None:
    found = job.results[0]
    assert 3 <= found.pop("unreachable")["seconds"] < 30
    assert {name: f["seconds"] for name, f in found.items() if f["seconds"] > 30} == {}


def test_an_unreachable_service_ends_the_process_with_its_address(job: JobResult) -> None:
    address = job.addresses["worker"][1]
    expected = "AggregatorUnreachableError: Expected an aggregation service"
    lines = [i for i in job.logs["worker 0"].splitlines() if expected in i]
    assert f"at {address} within 1 s" in lines[-1]


def test_workers_with_different_models_are_all_told(tmp_path: Path) -> None:
    statuses = {"worker 0": 1, "worker 1": 1}
    job = run_job("mismatch.py", tmp_path, workers=2, arguments={"different": 1}, statuses=statuses)
    for task, log in job.logs.items():
        error = next(i for i in log.splitlines()[::-1] if "ModelMismatchError" in i)
        assert "unlike/kernel (float32, shape [8, 6]) on worker 0" in error, task
        assert "unlike/kernel (float32, shape [8, 5]) on worker 1" in error, task
        assert "Traceback" not in log.partition("ModelMismatchError")[2], task
    # Neither waits for the other, which would take 150 s.
    assert abs(job.ended["worker 0"] - job.ended["worker 1"]) < 40
