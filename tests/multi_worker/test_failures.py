"""A worker that fails does not take the others with it, unless the service lives with it."""

import signal
import socket
from pathlib import Path

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(260)

ROUNDS = 80


def test_workers_go_on_when_one_raises(tmp_path: Path) -> None:
    arguments = {"backup_workers": 1, "failing": 1, "signal": False}
    statuses = {"worker 1": 1}
    job = run_job("failures.py", tmp_path, workers=3, arguments=arguments, statuses=statuses)
    _check_survivors(job, [0, 2])
    assert "FloatingPointError: this worker has had enough" in job.logs["worker 1"]
    # It does not stay for the others, which would take 60 s.
    assert job.ended["worker 1"] < job.ended["worker 0"] + 30


def test_the_last_worker_goes_on_when_the_other_is_killed(tmp_path: Path) -> None:
    arguments = {"backup_workers": 0, "failing": 1, "signal": True}
    statuses = {"worker 1": -signal.SIGKILL}
    job = run_job("failures.py", tmp_path, workers=2, ps=1, arguments=arguments, statuses=statuses)
    _check_survivors(job, [0])
    assert "worker 1 is gone" in job.logs["worker 0"]
    assert "worker 1 is gone" in job.logs["ps 0"]
    assert f"worker 1 was in time in all {ROUNDS} rounds" not in job.logs["worker 0"]


def test_the_service_of_a_killed_chief_ends_and_the_others_say_so(tmp_path: Path) -> None:
    # Worker 1 must not finish alone before the service has noticed.
    arguments = {"backup_workers": 0, "failing": 0, "signal": True, "min_workers": 2}
    statuses = {"worker 0": -signal.SIGKILL, "worker 1": 1}
    # The harness fails the test if any process is left.
    job = run_job("failures.py", tmp_path, workers=2, arguments=arguments, statuses=statuses)
    assert job.results == {}
    last = job.logs["worker 1"].splitlines()[-1]
    assert "ServiceError" in last
    assert f"{job.addresses['worker'][0]} went away" in last
    assert "lives and dies with worker 0" in last
    # It has waited 10 s for worker 0 to be started again.
    assert 4 < job.ended["worker 1"] - job.ended["worker 0"] < 60
    host, _, port = job.addresses["worker"][0].rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def _check_survivors(job: JobResult, workers: list[int]) -> None:
    assert sorted(job.results) == workers
    job.common("weights_sha256")
    job.common("optimizer_sha256")
    history = job.common("history")
    assert len(history["loss"]) == 4
    assert history["val_loss"][-1] < history["val_loss"][0]
    for local in job.each("local"):
        assert local["rounds"] == ROUNDS
        assert local["contributed"] + local["late"] + local["replayed"] == ROUNDS
