"""Services that are killed and come back: no round is lost, and none is made twice."""

from pathlib import Path

import pytest

from .injector import Faults
from .jobs import FaultyJob

pytestmark = pytest.mark.timeout(200)

ROUNDS = 220
KILLS = 10


def kills(ps: int = 0, count: int = KILLS) -> Faults:
    """Kills a service again and again: in the first rounds, and then every 20 rounds."""
    faults = Faults()
    for number in range(count):
        at_round = number if number < 4 else number * 20
        faults.kill(ps=ps, at_round=at_round).restart(after_seconds=0.1)
    return faults


def run(directory: Path, plan: Faults, **how: object) -> FaultyJob:
    """Runs a job to its end."""
    backup_workers = how.pop("backup_workers", 0)
    arguments = {"rounds": ROUNDS, "step_seconds": 0.03, "backup_workers": backup_workers}
    directory.mkdir()
    job = FaultyJob("loop.py", directory, plan=plan, arguments=arguments, proxied=False, **how)
    with job:
        job.run().check_alike(ROUNDS)
    return job


def test_a_run_is_that_of_an_undisturbed_job(tmp_path: Path) -> None:
    disturbed = run(tmp_path / "disturbed", kills(), workers=2)
    quiet = run(tmp_path / "quiet", Faults(), workers=2)
    assert len(disturbed.lives["ps 0"]) == KILLS + 1
    for name in ("weights_sha256", "optimizer_sha256"):
        assert disturbed.results()[0][name] == quiet.results()[0][name]
    # Not only at the end, but after every round.
    assert dict(disturbed.lives["worker 0"][0].trace) == dict(quiet.lives["worker 0"][0].trace)


def test_with_backup_workers_no_round_is_made_twice(tmp_path: Path) -> None:
    job = run(tmp_path / "job", kills(), workers=3, backup_workers=1)
    assert len(job.lives["ps 0"]) == KILLS + 1
    assert sorted(job.results()) == [0, 1, 2]


def test_one_of_two_services(tmp_path: Path) -> None:
    plan = kills(ps=1, count=5)
    job = run(tmp_path / "job", plan, workers=2, ps=2)
    assert len(job.lives["ps 1"]) == 6 and len(job.lives["ps 0"]) == 1
    assert sorted(job.results()) == [0, 1]
