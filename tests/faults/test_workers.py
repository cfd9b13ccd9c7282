"""Workers that are killed, stopped, cut off or reset: the others go on, and they come back."""

import concurrent.futures
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .injector import Chaos, Faults
from .jobs import FaultyJob

pytestmark = pytest.mark.timeout(290)

# Enough for all faults on a busy machine: the last rounds take no time.
STEPS, EPOCHS = 12, 10
ROUNDS = 140
CHAOS_SECONDS = 15.0


def early(action: str) -> Faults:
    """Lets the same happen to another worker in each of the first rounds, and to one much later.

    Connections break in the same rounds, where nothing else does.
    """
    faults = Faults()
    if action == "stop":
        for at_round in range(4):
            faults.reset(worker=0, at_round=at_round)
    later = random.Random(action).randint(20, 40)
    for worker, at_round in ((3, 0), (1, 1), (2, 2), (3, 3), (0, later)):
        if action == "kill":
            faults.kill(worker=worker, at_round=at_round).restart()
        else:
            add = faults.stop if action == "stop" else faults.cut
            add(worker=worker, at_round=at_round, seconds=4.0)
    # Worker 0 holds the only state until the others have come back.
    return faults.sparing(2)


def coming_and_going() -> Faults:
    """Workers 0 and 1 are killed twice and come back, worker 2 is killed for good."""
    plan = Faults()
    for at_round in (5, 30):
        plan.kill(worker=1, at_round=at_round).restart()
        plan.kill(worker=0, at_round=at_round + 20).restart()
    return plan.kill(worker=2, at_round=60).sparing(1)


def chaos(backup_workers: int, seconds: float) -> dict[str, Any]:
    """Returns a job to which something happens every few seconds."""
    rounds = int(seconds / 0.15) + 50
    return {
        "program": "loop.py",
        "plan": Chaos(seed=backup_workers, seconds=seconds, kills_services=True),
        "workers": 4,
        "arguments": {"rounds": rounds, "step_seconds": 0.15, "backup_workers": backup_workers},
    }


def run(directory: Path, program: str, seconds: float, **how: Any) -> FaultyJob:
    """Runs a job to its end."""
    with FaultyJob(program, directory, seconds=seconds, **how) as job:
        return job.run()


Jobs = dict[str, concurrent.futures.Future]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs that run two at a time: most of their time is waiting."""
    fit = {"steps": STEPS, "epochs": EPOCHS, "step_seconds": 0.12}
    wanted = {
        action: {
            "program": "fit.py",
            "plan": early(action),
            "workers": 4,
            "arguments": fit | {"backup_workers": int(action == "stop")},
        }
        for action in ("kill", "stop", "cut")
    }
    wanted["loop"] = {
        "program": "loop.py",
        "plan": coming_and_going(),
        "workers": 3,
        "arguments": {"rounds": ROUNDS, "step_seconds": 0.12},
    }
    wanted |= {f"chaos_{b}": chaos(b, CHAOS_SECONDS) for b in (0, 1)}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, tmp_path_factory.mktemp(name), seconds=240.0, **how)
            for name, how in wanted.items()
        }
        # Those that no selected test has asked for.
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("action", ["kill", "stop", "cut"])
def test_a_fault_in_each_early_round(jobs: Jobs, action: str) -> None:
    job = jobs[action].result()
    job.check_alike(STEPS * EPOCHS)
    assert sorted(job.results()) == [0, 1, 2, 3]
    for life in job.last_lives:
        # Worker 0 is killed last, and may come back for the last rounds only.
        assert life.result["local"]["contributed"] > 0 or life.task == "worker 0"
        # Who comes back does not begin with the first epoch, but ends with the last one.
        assert life.result["epochs"][-1] == EPOCHS - 1


def test_a_custom_loop_goes_on_where_the_job_is(jobs: Jobs) -> None:
    job = jobs["loop"].result()
    job.check_alike(ROUNDS)
    assert sorted(job.results()) == [0, 1], "worker 2 does not come back"
    for worker in (0, 1):
        assert len(job.lives[f"worker {worker}"]) == 3
        assert job.results()[worker]["resumed_at"] > 0


def check_chaos(job: FaultyJob, how: dict[str, Any]) -> None:
    job.check_alike(how["arguments"]["rounds"])
    assert sorted(job.results()) == [0, 1, 2, 3]
    # On a busy machine it takes long until enough workers are sound again for another fault.
    assert len(job.applied) >= max(2, how["plan"].seconds / 10)


@pytest.mark.parametrize("backup_workers", [0, 1])
def test_a_fault_every_few_seconds(jobs: Jobs, backup_workers: int) -> None:
    how = chaos(backup_workers, CHAOS_SECONDS)
    check_chaos(jobs[f"chaos_{backup_workers}"].result(), how)


@pytest.mark.slow
@pytest.mark.parametrize("backup_workers", [0, 1])
def test_a_fault_every_few_seconds_for_a_minute(tmp_path: Path, backup_workers: int) -> None:
    how = chaos(backup_workers, 60.0)
    check_chaos(run(tmp_path, seconds=270.0, **how), how)
