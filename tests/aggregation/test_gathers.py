"""Gathers: one message per worker, closed by the cutoff of the rounds."""

import itertools

import pytest

from tf_syncdist.aggregation.gathers import GatherClosed, GatherKey, Gathers, Part
from tf_syncdist.aggregation.rounds import RoundError
from tf_syncdist.cutoff import BackupWorkers, CutoffPolicy, FullSync

LAYOUT, SIZE = 5, 3
METRICS, STOP = 1, 3


def key(run: int) -> GatherKey:
    """Names the metrics after some runs."""
    return GatherKey(METRICS, run)


def part(run: int) -> Part:
    """What a worker says that agrees with the others."""
    return Part(run, LAYOUT, SIZE)


def gathered(run: int, contributors: tuple[int, ...]) -> GatherClosed:
    """What comes of the metrics after some runs."""
    return GatherClosed(key(run), run, contributors, min(contributors), (), False)


class Job:
    """Gathers of workers whose runs are set by hand."""

    def __init__(self, num_workers: int, policy: CutoffPolicy) -> None:
        self.at = [0] * num_workers
        self.gathers = Gathers(num_workers, policy, lambda worker: self.at[worker])

    def come(self, worker: int, run: int) -> tuple[bool, list[GatherClosed]]:
        """Lets a worker that has done `run` runs take part; returns what comes of it."""
        self.at[worker] = run
        return self.gathers.contribute(worker, key(run), part(run), 0.0), self.gathers.close(0.0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_first_n_are_in_and_the_late_one_is_not(order: tuple[int, ...]) -> None:
    job = Job(3, BackupWorkers(1))
    assert job.come(order[0], 5) == (True, [])
    assert job.come(order[1], 5) == (True, [gathered(5, order[:2])])
    assert job.come(order[2], 5) == (False, [])


def test_a_second_message_of_a_worker_is_not_added() -> None:
    job = Job(3, FullSync())
    assert job.come(0, 5) == (True, [])
    assert job.come(0, 5) == (False, [])
    assert job.come(1, 5) == (True, [])
    assert job.come(2, 5) == (True, [gathered(5, (0, 1, 2))])
    assert job.come(0, 5) == (False, [])


def test_nobody_waits_for_workers_that_have_gone_past() -> None:
    job = Job(3, FullSync())
    job.at = [5, 5, 4]
    assert job.come(0, 5) == (True, [])
    job.at[1] = 6
    assert job.gathers.close(0.0) == []
    job.at[2] = 6
    assert job.gathers.close(0.0) == [gathered(5, (0,))]


def test_workers_behind_are_waited_for() -> None:
    job = Job(2, FullSync())
    assert job.come(0, 100) == (True, [])
    for job.at[1] in range(101):
        assert job.gathers.close(0.0) == []
    assert job.come(1, 100) == (True, [gathered(100, (0, 1))])


def test_nobody_waits_for_workers_that_have_left() -> None:
    job = Job(3, FullSync())
    job.come(0, 5)
    job.gathers.leave(2)
    assert job.gathers.close(0.0) == []
    job.gathers.leave(1)
    job.gathers.leave(1)
    assert job.gathers.close(0.0) == [gathered(5, (0,))]


def test_what_a_leaver_had_sent_stays_in() -> None:
    job = Job(3, FullSync())
    job.come(2, 5)
    job.gathers.leave(2)
    assert job.come(0, 5) == (True, [])
    assert job.come(1, 5) == (True, [gathered(5, (2, 0, 1))])


def test_several_gathers_can_be_open() -> None:
    job = Job(3, BackupWorkers(1))
    assert job.come(0, 5) == (True, [])
    job.at[0] = 6
    assert job.come(0, 7) == (True, [])
    assert job.come(1, 7)[1] == [gathered(7, (0, 1))]
    # Worker 1 will never send for run 5 any more.
    assert job.come(2, 5) == (True, [gathered(5, (0, 2))])


@pytest.mark.parametrize("layout, size", [(LAYOUT + 1, SIZE), (LAYOUT, SIZE + 1)])
@pytest.mark.parametrize("closed", [False, True])
def test_workers_must_sum_the_same_metrics(layout: int, size: int, closed: bool) -> None:
    job = Job(3, BackupWorkers(1 if closed else 0))
    job.come(0, 5)
    job.come(1, 5)
    with pytest.raises(RoundError, match=f"after run 5: 3 value.*{size} value.*from worker 2"):
        job.gathers.contribute(2, key(5), Part(5, layout, size), 0.0)


def test_an_exchange_is_forgotten_when_every_present_worker_is_past_it() -> None:
    job = Job(3, BackupWorkers(1))
    for run in (2, 4):
        for worker in (0, 1):
            job.come(worker, run)
    job.at = [5, 5, 2]
    assert job.gathers.forget({0, 1, 2}) == []
    assert job.come(2, 2) == (False, [])
    job.at[2] = 3
    assert job.gathers.forget({0, 1, 2}) == [key(2)]
    assert job.gathers.forget({0, 1, 2}) == []
    assert job.gathers.forget({0, 1}) == [key(4)]


def test_an_open_exchange_is_not_forgotten() -> None:
    job = Job(3, FullSync())
    job.come(0, 2)
    job.at = [3, 3, 3]
    assert job.gathers.forget({0, 1, 2}) == []
    assert job.gathers.close(0.0) == [gathered(2, (0,))]
    assert job.gathers.forget({0, 1, 2}) == [key(2)]
