"""Gathers: one message per worker, closed by the cutoff of the rounds."""

import itertools

import pytest

from tf_syncdist.aggregation import gathers
from tf_syncdist.aggregation.gathers import (
    LEARNERS,
    PROPAGATION,
    START,
    GatherClosed,
    GatherKey,
    Gathers,
    Part,
)
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
        self.there = set(range(num_workers))
        self.gathers = Gathers(
            num_workers, policy, lambda worker: self.at[worker], lambda: self.there
        )

    def come(self, worker: int, run: int, empty: bool = False) -> tuple[bool, list[GatherClosed]]:
        """Lets a worker that has done `run` runs take part; returns what comes of it."""
        self.at[worker] = run
        said = part(run)._replace(empty=empty)
        return self.gathers.contribute(worker, key(run), said, 0.0), self.gathers.close(0.0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_first_n_are_in_and_the_late_one_is_not(order: tuple[int, ...]) -> None:
    job = Job(3, BackupWorkers(1))
    assert job.come(order[0], 5) == (True, [])
    assert job.come(order[1], 5) == (True, [gathered(5, order[:2])])
    assert job.come(order[2], 5) == (False, [])


def test_those_that_have_nothing_to_add_wait_for_those_that_may_have() -> None:
    job = Job(3, BackupWorkers(2))
    assert job.come(1, 5, empty=True) == (True, [])
    assert job.come(2, 5, empty=True) == (True, [])
    job.there = {1, 2}
    assert job.gathers.close(0.0) == [gathered(5, (1, 2))]
    assert job.come(2, 7, empty=True) == (True, [])
    job.at[1] = 8
    assert job.gathers.close(0.0) == [gathered(7, (2,))]
    # The first one that has is enough, if so many are.
    job = Job(3, BackupWorkers(1))
    assert job.come(2, 5, empty=True) == (True, [])
    assert job.come(1, 5, empty=True) == (True, [])
    assert job.come(0, 5) == (True, [gathered(5, (2, 1, 0))])


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
    job.there.discard(2)
    assert job.gathers.close(0.0) == []
    job.there.discard(1)
    job.there.discard(1)
    assert job.gathers.close(0.0) == [gathered(5, (0,))]


def test_what_a_leaver_had_sent_stays_in() -> None:
    job = Job(3, FullSync())
    job.come(2, 5)
    job.there.discard(2)
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


def test_nothing_is_forgotten_that_a_worker_skips_to() -> None:
    """It goes on from the state of run 5; its program has done one run."""
    job = Job(3, BackupWorkers(1))
    for run in (2, 4):
        for worker in (0, 1):
            job.come(worker, run)
    job.at = [5, 5, 5]
    job.gathers.skip(2, 1)
    job.gathers.skip(2, 3)
    assert job.gathers.forget({0, 1, 2}) == []
    assert job.come(2, 2) == (False, [])
    job.at[2] = 6
    job.gathers.arrive(2)
    assert job.gathers.forget({0, 1, 2}) == [key(2), key(4)]


def test_who_asks_for_what_is_dropped_is_alone_in_it() -> None:
    job = Job(3, BackupWorkers(1))
    job.come(0, 2)
    job.gathers.drop(key(2))
    assert job.come(1, 2) == (True, [gathered(2, (0, 1))])
    job.at = [3, 3, 3]
    job.gathers.drop(key(2))
    assert job.gathers.contribute(2, key(2), part(2), 0.0)
    assert job.gathers.close(0.0) == [gathered(2, (2,))]


def test_an_open_exchange_is_not_forgotten() -> None:
    job = Job(3, FullSync())
    job.come(0, 2)
    job.at = [3, 3, 3]
    assert job.gathers.forget({0, 1, 2}) == []
    assert job.gathers.close(0.0) == [gathered(2, (0,))]
    assert job.gathers.forget({0, 1, 2}) == [key(2)]


def take_part(job: Job, worker: int, kind: int, **said: object) -> list[GatherClosed]:
    """Lets a worker take part in gather 7 of a kind after 5 runs."""
    job.at[worker] = max(job.at[worker], 5)
    job.gathers.contribute(worker, GatherKey(kind, 7), part(5)._replace(**said), 0.0)
    return job.gathers.close(0.0)


def test_a_start_waits_for_worker_0_and_a_stop_does_not() -> None:
    job = Job(4, BackupWorkers(2))
    assert take_part(job, 3, STOP) == [] and take_part(job, 1, STOP) != []
    for worker in (3, 1, 2):
        assert take_part(job, worker, START) == []
    (closed,) = take_part(job, 0, START)
    assert closed.contributors == (3, 1, 2, 0)


def test_a_start_is_not_closed_by_worker_0_alone() -> None:
    job = Job(3, BackupWorkers(1))
    assert take_part(job, 0, START) == []
    (closed,) = take_part(job, 2, START)
    assert closed.contributors == (0, 2)


def test_a_start_does_not_wait_for_worker_0_when_it_cannot_come() -> None:
    for leaves in (True, False):
        job = Job(3, BackupWorkers(1))
        take_part(job, 1, START)
        assert take_part(job, 2, START) == []
        if leaves:
            job.there.discard(0)
        else:
            job.at[0] = 6
        (closed,) = job.gathers.close(0.0)
        assert closed.contributors == (1, 2) and closed.reference == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_hashes_are_those_of_the_lowest_worker(order: tuple[int, ...]) -> None:
    job = Job(4, BackupWorkers(1))
    for worker in order:
        closed = take_part(job, worker + 1, STOP, hashes=(worker + 1, 9))
    assert closed[0].reference == 1 and closed[0].hashes == (1, 9)


@pytest.mark.parametrize("wishes", [(), (0,), (2,), (0, 1, 2)])
def test_one_wish_is_enough_to_stop(wishes: tuple[int, ...]) -> None:
    job = Job(3, FullSync())
    for worker in range(3):
        closed = take_part(job, worker, STOP, stop=worker in wishes)
    assert closed[0].stop == bool(wishes)


@pytest.mark.parametrize("begun", [False, True])
def test_what_others_have_gathered_already_is_not_gathered_anew(begun: bool) -> None:
    job = Job(2, FullSync())
    name = GatherKey(LEARNERS, 0)
    if begun:
        # A worker that is new does not know of it.
        assert job.gathers.contribute(0, name, part(0), 0.0) and job.gathers.waiting
    assert job.gathers.restore(name, 0)
    assert not job.gathers.waiting and job.gathers.close(0.0) == []
    assert not job.gathers.restore(name, 0)
    assert not job.gathers.contribute(0, name, part(0), 0.0)


def test_what_is_for_the_whole_job_is_kept() -> None:
    job = Job(2, FullSync())
    for kind in (START, PROPAGATION, LEARNERS):
        for worker in (0, 1):
            job.gathers.contribute(worker, GatherKey(kind, 0), part(0), 0.0)
        job.gathers.close(0.0)
    job.at = [9, 9]
    assert job.gathers.forget({0, 1}) == [GatherKey(START, 0)]
    assert not job.gathers.contribute(1, GatherKey(LEARNERS, 0), part(0), 0.0)


def test_results_of_old_gathers_are_thrown_away_but_not_what_the_job_has_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathers, "_MOST_RESULT_BYTES", 2000)
    results = gathers.RecentResults()
    results[GatherKey(LEARNERS, 0)] = bytes(900)
    for serial in range(9):
        results[GatherKey(METRICS, serial)] = bytes(300)
        results[GatherKey(LEARNERS, 1 + serial)] = bytes(300)
    assert list(results)[0] == GatherKey(LEARNERS, 0) and len(results) == 2
    results[GatherKey(PROPAGATION, 0)] = bytes(5000)
    assert list(results) == [GatherKey(LEARNERS, 0), GatherKey(PROPAGATION, 0)]


def test_kinds_and_serials_are_separate_and_nothing_stays() -> None:
    job = Job(2, FullSync())
    keys = [GatherKey(kind, serial) for kind in (METRICS, START, STOP) for serial in range(20)]
    closed = []
    for name in keys:
        for worker in (0, 1):
            assert job.gathers.contribute(worker, name, part(3), 0.0)
        closed += job.gathers.close(0.0)
    assert [c.key for c in closed] == keys
    job.at = [4, 3]
    assert job.gathers.forget({0, 1}) == []
    job.at = [4, 4]
    assert job.gathers.forget({0, 1}) == keys
    assert job.gathers.forget({0, 1}) == [] and not job.gathers.waiting
