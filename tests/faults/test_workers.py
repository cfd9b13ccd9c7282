"""Workers that are killed, stopped, cut off or reset: the others go on, and they come back."""

import random
from pathlib import Path

import pytest

from .injector import Chaos, Faults
from .jobs import FaultyJob

pytestmark = pytest.mark.timeout(200)

STEPS, EPOCHS = 20, 6
FIT = {"steps": STEPS, "epochs": EPOCHS, "step_seconds": 0.05}


def early(action: str) -> Faults:
    """Lets the same happen to another worker in each of the first rounds, and to one much later.

    Connections break in the same rounds, where nothing else does.
    """
    faults = Faults()
    if action == "stop":
        for at_round in range(4):
            faults.reset(worker=0, at_round=at_round)
    later = random.Random(action).randint(30, 60)
    for worker, at_round in ((3, 0), (1, 1), (2, 2), (3, 3), (0, later)):
        if action == "kill":
            faults.kill(worker=worker, at_round=at_round).restart()
        else:
            add = faults.stop if action == "stop" else faults.cut
            add(worker=worker, at_round=at_round, seconds=4.0)
    # Worker 0 holds the only state until the others have come back.
    return faults.sparing(2)


@pytest.mark.parametrize("action", ["kill", "stop", "cut"])
def test_a_fault_in_each_early_round(tmp_path: Path, action: str) -> None:
    arguments = FIT | {"backup_workers": 1 if action == "stop" else 0}
    plan = early(action)
    with FaultyJob("fit.py", tmp_path, workers=4, plan=plan, arguments=arguments) as job:
        job.run().check_alike(STEPS * EPOCHS)
        assert sorted(job.results()) == [0, 1, 2, 3]
        for life in job.last_lives:
            assert life.result["local"]["contributed"] > 0, life.task
            if life.number:
                # The epochs that were over when it came back are not done again.
                assert life.result["epochs"][-1] == EPOCHS - 1


def test_a_custom_loop_goes_on_where_the_job_is(tmp_path: Path) -> None:
    plan = Faults()
    for at_round in (5, 40):
        plan.kill(worker=1, at_round=at_round).restart()
        plan.kill(worker=0, at_round=at_round + 30).restart()
    plan.kill(worker=2, at_round=100).sparing(2)
    arguments = {"rounds": 150, "step_seconds": 0.05}
    with FaultyJob("loop.py", tmp_path, workers=3, plan=plan, arguments=arguments) as job:
        job.run().check_alike(150)
        assert sorted(job.results()) == [0, 1], "worker 2 does not come back"
        for worker in (0, 1):
            assert len(job.lives[f"worker {worker}"]) == 3
            assert job.results()[worker]["resumed_at"] > 0


@pytest.mark.parametrize("backup_workers", [0, 1])
@pytest.mark.parametrize("seconds", [15.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_fault_every_few_seconds(tmp_path: Path, backup_workers: int, seconds: float) -> None:
    plan = Chaos(seed=backup_workers, seconds=seconds, kills_services=True)
    rounds = int(seconds / 0.1) + 100
    arguments = {"rounds": rounds, "step_seconds": 0.1, "backup_workers": backup_workers}
    with FaultyJob(
        "loop.py", tmp_path, workers=4, plan=plan, arguments=arguments, seconds=seconds + 100
    ) as job:
        job.run().check_alike(rounds)
        assert sorted(job.results()) == [0, 1, 2, 3]
        assert len(plan.happened) >= seconds / 6
