"""A worker that falls further behind than results are kept takes over another one's state."""

from pathlib import Path

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(260)

PAUSED = 2
ROUNDS = 40


def test_a_worker_is_refreshed_and_comes_back(tmp_path: Path) -> None:
    # The others give it time then, so that they do not leave it again.
    arguments = {"paused": PAUSED, "until_round": 15}
    job = run_job("refresh.py", tmp_path, workers=3, arguments=arguments)
    _check(job)
    refreshed = job.results[PAUSED]["local"]
    assert 5 < refreshed["missed"] < 30
    assert refreshed["contributed"] > 5


def test_a_worker_is_refreshed_when_the_others_are_done(tmp_path: Path) -> None:
    # While it pauses the others need each other, so that nobody else is left behind.
    arguments = {"paused": PAUSED, "until_round": ROUNDS}
    job = run_job("refresh.py", tmp_path, workers=3, arguments=arguments)
    _check(job)
    assert job.results[PAUSED]["local"]["missed"] > 20


def _check(job: JobResult) -> None:
    job.common("weights_sha256")
    job.common("optimizer_sha256")
    job.common("history")
    assert job.common("iterations") == ROUNDS
    assert job.common("batches") == ROUNDS
    for index, local in enumerate(job.each("local")):
        assert local["rounds"] == ROUNDS
        assert local["contributed"] + local["late"] + local["replayed"] == ROUNDS
        assert local["missed"] <= local["replayed"]
        late = local["late"] + local["replayed"]
        if late:
            assert f"worker {index} was late in {late} of {ROUNDS} rounds" in job.logs["worker 0"]
    assert f"worker {PAUSED} was too far behind" in job.logs[f"worker {PAUSED}"]
