"""Faults while updates wait for the next run: no round is lost, and none is made twice."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .injector import Faults
from .jobs import FaultyJob

pytestmark = pytest.mark.timeout(290)

# After most runs nobody looks at the variables, so that an update is waiting when something breaks.
PRIORITY = {"priority": {"slice_elements": 50, "credit_bytes": 400}, "note_every": 3}
ROUNDS = 45
STEPS, EPOCHS = 12, 10
KILLS = (0, 1, 4, 30)


def service_kills() -> Faults:
    """Kills the service in early rounds and in late ones."""
    faults = Faults()
    for at_round in KILLS:
        faults.kill(ps=0, at_round=at_round).restart(after_seconds=0.1)
    return faults


def worker_kills() -> Faults:
    """Kills every worker once; each comes back."""
    faults = Faults()
    for worker, at_round in ((2, 1), (1, 9), (0, 30)):
        faults.kill(worker=worker, at_round=at_round).restart()
    return faults.sparing(2)


def run(directory: Path, program: str, plan: Faults, **how: Any) -> FaultyJob:
    """Runs a job to its end."""
    job = FaultyJob(program, directory, plan=plan, seconds=200.0, proxied=False, **how)
    with job:
        return job.run()


Jobs = dict[str, concurrent.futures.Future]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs that run two at a time: most of their time is waiting."""
    loop = {"program": "loop.py", "workers": 2}
    arguments = PRIORITY | {"rounds": ROUNDS, "step_seconds": 0.02, "min_workers": 2}
    fit = PRIORITY | {"steps": STEPS, "epochs": EPOCHS, "step_seconds": 0.12}
    wanted: dict[str, dict[str, Any]] = {
        "disturbed": {"plan": service_kills(), "arguments": arguments, **loop},
        "quiet": {"plan": Faults(), "arguments": arguments, **loop},
        "workers": {"program": "fit.py", "workers": 3, "plan": worker_kills(), "arguments": fit},
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, tmp_path_factory.mktemp(name), **how)
            for name, how in wanted.items()
        }
        # Those that no selected test has asked for.
        pool.shutdown(cancel_futures=True)


def test_a_service_that_is_killed_changes_no_bit(jobs: Jobs) -> None:
    disturbed, quiet = jobs["disturbed"].result(), jobs["quiet"].result()
    assert len(disturbed.lives["ps 0"]) == len(KILLS) + 1
    for job in (disturbed, quiet):
        job.check_alike(ROUNDS)
        assert "at its end, not in the next run" not in job.text
    for name in ("weights_sha256", "optimizer_sha256"):
        assert disturbed.results()[0][name] == quiet.results()[0][name]
    assert dict(disturbed.lives["worker 0"][0].trace) == dict(quiet.lives["worker 0"][0].trace)


def test_workers_that_are_killed_come_back_to_a_state_with_all_updates(jobs: Jobs) -> None:
    job = jobs["workers"].result()
    job.check_alike(STEPS * EPOCHS)
    assert sorted(job.results()) == [0, 1, 2]
    for worker in range(3):
        assert len(job.lives[f"worker {worker}"]) == 2
        assert job.results()[worker]["epochs"][-1] == EPOCHS - 1
