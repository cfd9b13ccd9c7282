"""Services that are killed and come back: no round is lost, and none is made twice."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .injector import Faults
from .jobs import FaultyJob

pytestmark = pytest.mark.timeout(290)

ROUNDS = 100
KILLS = 10


def kills(ps: int = 0, count: int = KILLS) -> Faults:
    """Kills a service again and again: in the first rounds, and then every 8 rounds."""
    faults = Faults()
    for number in range(count):
        at_round = number if number < 4 else number * 8
        faults.kill(ps=ps, at_round=at_round).restart(after_seconds=0.1)
    return faults


def child_kills() -> Faults:
    """Kills the service that worker 0 has started."""
    faults = Faults()
    for at_round in (0, 1, 20, 50):
        faults.kill_child(worker=0, at_round=at_round)
    return faults


def run(
    directory: Path, plan: Faults, backup_workers: int = 0, min_workers: int = 1, **how: Any
) -> FaultyJob:
    """Runs a job to its end."""
    arguments = {
        "rounds": ROUNDS,
        "step_seconds": 0.03,
        "backup_workers": backup_workers,
        "min_workers": min_workers,
    }
    job = FaultyJob("loop.py", directory, plan=plan, arguments=arguments, proxied=False, **how)
    with job:
        return job.run()


Jobs = dict[str, concurrent.futures.Future]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs that run two at a time: most of their time is waiting."""
    # Where sums are to be those of both workers, none is left out for having had no turn.
    both = {"workers": 2, "min_workers": 2}
    wanted = {
        "disturbed": {"plan": kills(), **both},
        "quiet": {"plan": Faults(), **both},
        "backup": {"plan": kills(), "workers": 3, "backup_workers": 1},
        "one_of_two": {"plan": kills(ps=1, count=5), "workers": 2, "ps": 2},
        "child": {"plan": child_kills(), "ps": 0, **both},
        "chief": {"plan": Faults().kill(worker=0, at_round=30).restart(), "workers": 3, "ps": 0},
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, tmp_path_factory.mktemp(name), seconds=200.0, **how)
            for name, how in wanted.items()
        }
        # Those that no selected test has asked for.
        pool.shutdown(cancel_futures=True)


def test_a_run_is_that_of_an_undisturbed_job(jobs: Jobs) -> None:
    disturbed, quiet = jobs["disturbed"].result(), jobs["quiet"].result()
    assert len(disturbed.lives["ps 0"]) == KILLS + 1
    for job in (disturbed, quiet):
        job.check_alike(ROUNDS)
    for name in ("weights_sha256", "optimizer_sha256"):
        assert disturbed.results()[0][name] == quiet.results()[0][name]
    # Not only at the end, but after every round.
    assert dict(disturbed.lives["worker 0"][0].trace) == dict(quiet.lives["worker 0"][0].trace)
    assert [r["local"]["contributed"] for r in disturbed.results().values()] == [ROUNDS] * 2


def test_with_backup_workers_no_round_is_made_twice(jobs: Jobs) -> None:
    job = jobs["backup"].result()
    job.check_alike(ROUNDS)
    assert len(job.lives["ps 0"]) == KILLS + 1
    assert sorted(job.results()) == [0, 1, 2]


def test_one_of_two_services(jobs: Jobs) -> None:
    job = jobs["one_of_two"].result()
    job.check_alike(ROUNDS)
    assert len(job.lives["ps 1"]) == 6 and len(job.lives["ps 0"]) == 1
    assert sorted(job.results()) == [0, 1]


def test_worker_0_starts_its_service_again(jobs: Jobs) -> None:
    job, quiet = jobs["child"].result(), jobs["quiet"].result()
    job.check_alike(ROUNDS)
    assert len(job.applied) == 4
    assert job.results()[0]["weights_sha256"] == quiet.results()[0]["weights_sha256"]


def test_the_others_wait_for_worker_0_where_the_service_lives_with_it(jobs: Jobs) -> None:
    job = jobs["chief"].result()
    job.check_alike(ROUNDS)
    assert sorted(job.results()) == [0, 1, 2]
    assert len(job.lives["worker 0"]) == 2
    assert job.results()[0]["resumed_at"] >= 30
