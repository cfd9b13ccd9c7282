"""Model averaging when workers and services are killed: all hold one central model, always."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .injector import Faults
from .jobs import FaultyJob

pytestmark = pytest.mark.timeout(290)

STEPS, EPOCHS = 20, 3


def run(
    directory: Path, plan: Faults, learners: int | str = 2, min_workers: int = 1, **how: Any
) -> FaultyJob:
    """Runs a job to its end."""
    arguments = {
        "learners": learners,
        "steps": STEPS,
        "epochs": EPOCHS,
        "step_seconds": 0.02,
        "min_workers": min_workers,
    }
    job = FaultyJob("averaging.py", directory, plan=plan, arguments=arguments, proxied=False, **how)
    with job:
        return job.run()


Jobs = dict[str, concurrent.futures.Future]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs that run two at a time: most of their time is waiting."""
    services = Faults()
    for at_round in (0, 5, 30):
        services.kill(ps=0, at_round=at_round).restart(after_seconds=0.1)
    wanted = {
        "workers": {
            "plan": Faults().kill(worker=1, at_round=22).restart().kill(worker=0, at_round=40),
            "workers": 3,
            "learners": "auto",
        },
        "services": {"plan": services, "workers": 2, "min_workers": 2},
        "child": {
            "plan": Faults().kill_child(worker=0, at_round=10),
            "workers": 2,
            "min_workers": 2,
            "ps": 0,
        },
        "quiet": {"plan": Faults(), "workers": 2, "min_workers": 2},
    }
    wanted["workers"]["plan"].restart()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, tmp_path_factory.mktemp(name), seconds=150.0, **how)
            for name, how in wanted.items()
        }
        # Those that no selected test has asked for.
        pool.shutdown(cancel_futures=True)


def test_workers_that_come_again_take_over_the_central_model(jobs: Jobs) -> None:
    job = jobs["workers"].result()
    assert [len(job.lives[f"worker {w}"]) for w in range(3)] == [2, 2, 1]
    job.check_alike(STEPS * EPOCHS)
    for worker in (0, 1):
        first, second = job.lives[f"worker {worker}"]
        # It goes on where the others are.
        rounds = [rounds for rounds, _ in second.trace if rounds]
        assert rounds[0] > max(rounds for rounds, _ in first.trace)
        assert second.result["epochs"][0] > 0
        assert second.result["epochs"][-1] == EPOCHS - 1
    for result in job.results().values():
        assert max(result["apart"]) < 1 and result["loss"] < 2
    # They have as many learners as the others have found to be worth while.
    everywhere = [n for lives in job.lives.values() for n in lives if n.result]
    assert len(everywhere) >= 3
    assert len({life.result["learners"] for life in everywhere}) == 1
    assert job.text.count("learners per device\n") == 1


@pytest.mark.parametrize("name", ["services", "child"])
def test_no_round_is_lost_or_made_twice_where_a_service_is_killed(jobs: Jobs, name: str) -> None:
    job, quiet = jobs[name].result(), jobs["quiet"].result()
    for one in (job, quiet):
        one.check_alike(STEPS * EPOCHS)
    if name == "services":
        assert len(job.lives["ps 0"]) == 4
    expected = quiet.results()[0]
    for worker, result in job.results().items():
        assert result["weights_sha256"] == expected["weights_sha256"]
        # Learners too are where they would be.
        assert result["apart"] == quiet.results()[worker]["apart"]
