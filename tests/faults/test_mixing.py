"""Strategies in which nobody waits: workers come late, go and come back, and so do services.

Each step adds one to a variable, so what the workers have come to tells how many steps are in it.
"""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .injector import Faults
from .jobs import FaultyJob, Life

pytestmark = pytest.mark.timeout(290)

STEPS = 160
LATE, LATE_BY = 2, 12
PARTNER_SECONDS = 0.8


def coming_and_going(ps: tuple[int, ...]) -> Faults:
    """Workers and services are killed, and come back."""
    plan = Faults().kill(worker=1, at_round=40).restart()
    for number, shard in enumerate(ps):
        plan.kill(ps=shard, at_round=60 + 15 * number).restart(after_seconds=0.2)
    return plan.kill(worker=0, at_round=100).restart()


def partners_that_fail() -> Faults:
    """One hangs for a while, the service goes and comes back, and another one goes for good."""
    plan = Faults().stop(worker=2, at_round=20, seconds=6 * PARTNER_SECONDS)
    plan.kill(ps=0, at_round=40).restart(after_seconds=0.2)
    return plan.kill(worker=1, at_round=70).restart().kill(worker=0, at_round=130)


def holds(ps: tuple[int, ...]) -> dict[str, dict[int, str]]:
    """Returns what a life waits for after some of its steps: a file, or its end.

    So faults come one after the other, and none too late, however slowly they are made to happen.
    """
    first = {50: "worker-1.life-1.trace"}
    first |= {90 + shard: f"ps-{shard}.life-1.log" for shard in ps}
    return {
        "worker-0.life-0": first | {100: "its end"},
        "worker-1.life-0": {40: "its end"},
        "worker-1.life-1": {100: "worker-0.life-1.trace"},
        "worker-2.life-0": {30: "worker-1.life-1.trace"},
    }


HOLDS_OF_PARTNERS = {
    "worker-0.life-0": {
        25: "worker-2.stopped",
        38: "worker-2.goes-on",
        60: "ps-0.life-1.log",
        100: "worker-1.life-1.trace",
        130: "its end",
    },
    "worker-1.life-0": {25: "worker-2.stopped", 38: "worker-2.goes-on", 70: "its end"},
    "worker-2.life-0": {20: "worker-2.stopped"},
}
JOBS: dict[str, dict[str, Any]] = {
    "elastic": {"plan": coming_and_going((0, 1)), "ps": 2, "holds": holds((0, 1))},
    "async": {"plan": coming_and_going((0,)), "ps": 1, "holds": holds((0,))},
    "gossip": {"plan": partners_that_fail(), "ps": 1, "holds": HOLDS_OF_PARTNERS},
}


def run(directory: Path, name: str) -> FaultyJob:
    """Runs a job to its end."""
    how = dict(JOBS[name])
    arguments = {
        "kind": name,
        "options": {"partner_timeout_seconds": PARTNER_SECONDS} if name == "gossip" else {},
        "steps": STEPS,
        "step_seconds": 0.015,
        "late": LATE,
        "late_by": LATE_BY,
        # The late one does not end before whoever dies is back, and has made so many steps.
        "last": "worker-1.life-1",
        "together": 40,
        "holds": how.pop("holds"),
    }
    with FaultyJob(
        "mixing.py", directory, workers=3, arguments=arguments, proxied=False, **how
    ) as job:
        return job.run()


Jobs = dict[str, concurrent.futures.Future]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs that run two at a time: most of their time is waiting."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, tmp_path_factory.mktemp(name), name) for name in JOBS}
        pool.shutdown(cancel_futures=True)


def values(life: Life) -> list[float]:
    """Returns the worker's model before each of its steps."""
    return [float(text.split()[0]) for _, text in life.trace]


def lives(job: FaultyJob) -> list[Life]:
    """Returns all lives of workers."""
    return [life for task, found in job.lives.items() if "worker" in task for life in found]


@pytest.mark.parametrize("name", JOBS)
def test_who_comes_late_or_again_begins_where_the_others_are(jobs: Jobs, name: str) -> None:
    job = jobs[name].result()
    late = values(job.lives[f"worker {LATE}"][0])
    # With the others' model of then, and not with its own.
    assert late[0] > 0.4 * LATE_BY
    # To pull from a partner that stands still is half of the way to its model.
    least = 0.45 if name == "gossip" else 0.7
    for life in lives(job):
        begun = values(life)
        is_late = life.task == f"worker {LATE}"
        assert len(begun) == STEPS or life.killed or (is_late and len(begun) > STEPS)
        if life.number:
            assert begun[0] > 15, (life.task, begun[:3])
            # A service that was started again has the newest centre that a worker has received.
        for before, after in zip(begun, begun[1:], strict=False):
            assert after > least * before - 3, (life.task, life.number, before, after)


def test_the_server_has_every_step_that_somebody_has_received(jobs: Jobs) -> None:
    job = jobs["async"].result()
    done = sum(len(values(life)) for life in lives(job))
    end = max(life.result["end"] for life in job.last_lives)
    # Whatever dies may take with it what nobody has heard of, or have done what it does again.
    deaths = len(job.applied)
    assert deaths == 3 and abs(end - done) <= 3 * deaths


def test_the_centre_follows_the_workers(jobs: Jobs) -> None:
    job = jobs["elastic"].result()
    assert len(job.lives["ps 0"]) == len(job.lives["ps 1"]) == 2
    for life in job.last_lives:
        assert abs(life.result["end"] - values(life)[-1]) < 0.3 * life.result["end"] + 5


def test_a_partner_that_hangs_costs_its_time_once(jobs: Jobs) -> None:
    job = jobs["gossip"].result()
    assert [life.task for life in job.last_lives] == ["worker 1", "worker 2"]
    for life in job.last_lives:
        own = life.result["own"]
        assert own["mixed"] > 5
        # Once for who is killed and comes back, and once for who is killed for good; and perhaps
        # for one or two that the machine has stalled.
        assert own["failed"] <= 4
    # Worker 0 has lived through all that, and through the one that hangs.
    dead = job.lives["worker 0"][0]
    assert dead.log.read_text().count("does not answer worker 0") <= 4
    took = [float(text.split()[1]) for _, text in dead.trace]
    assert sum(seconds > 0.8 * PARTNER_SECONDS for seconds in took) <= 4


@pytest.mark.parametrize("who", ["who comes again", "with the service"])
def test_fit_goes_on_in_the_epoch_of_the_others(tmp_path: Path, who: str) -> None:
    epochs = 6
    # Without `ps` tasks worker 0 brings a new service, which learns of the job from worker 1.
    ps, killed = (1, 1) if who == "who comes again" else (0, 0)
    stays, comes_again = f"worker {1 - killed}", f"worker {killed}"
    # In its third epoch, and when the other has come as far.
    killed_at = 20
    with FaultyJob(
        "mixing_fit.py",
        tmp_path,
        workers=2,
        ps=ps,
        plan=Faults().kill(worker=killed, at_round=killed_at).restart(),
        arguments={
            "batches": 16,
            "epochs": epochs,
            "step_seconds": 0.03,
            "killed": f"worker-{killed}.life-0",
            "stays": f"worker-{1 - killed}.life-0",
            "killed_at": killed_at,
            "comes_again": f"worker-{killed}.life-1",
            "held_at": 60,
        },
        proxied=False,
    ) as job:
        job.run()
    first, second = job.lives[stays][0].result, job.lives[comes_again][1].result
    assert first["epochs"] == [list(range(epochs))] * 2
    begun, then = second["epochs"]
    # It does one batch of a fit that is over, or skips the epochs that are over of the one in
    # progress.
    assert begun == list(range(begun[0], epochs)) and begun[0] >= 2
    assert then == list(range(epochs - len(then), epochs))
    # Keras' loss is the mean over the epoch so far; a batch has too few examples to tell.
    runs = 8
    losses, at_first = (values(life)[:runs] for life in job.lives[comes_again][::-1])
    assert losses[-1] < 0.92 * at_first[-1], (losses, at_first)
    # What it sees and may save after the first fit is what the others have trained, too.
    untrained = values(job.lives[stays][0])[0]
    assert max(first["ends"] + second["ends"]) < 0.75 * untrained
    assert max(first["ends"][1], second["ends"][1]) < 0.6 * untrained
    assert not any(first["stopped"] + second["stopped"])
