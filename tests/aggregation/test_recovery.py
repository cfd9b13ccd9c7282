"""What a service that was started again asks of the workers, and goes on with."""

import itertools
import random

import pytest

from tf_syncdist.aggregation.records import Fate, SliceKey, SliceSpec
from tf_syncdist.aggregation.recovery import GRACE_SECONDS, Recovery, Want, spec_of
from tf_syncdist.proto import tf_syncdist_pb2 as pb

SLICES = 2


def standing(
    run: int, members: tuple[int, ...], *held: tuple[int, bool, tuple[int, ...]]
) -> pb.Standing:
    """A worker in a run, with slices of one exchange of some runs: (run, done, slices)."""
    made = pb.Standing(job_seed=5, run=run, members=members, contributed=run)
    for number, done, slices in held:
        one = made.held.add(run=number, done=done, exchanges=int(done))
        for part in slices:
            one.slices.add(exchange=0, slice=part)
    return made


def result(key: SliceKey) -> pb.Result:
    """The result of a slice."""
    return pb.Result(
        run=key.run, slice=key.slice, num_slices=SLICES, dtype=pb.FLOAT32, elements=3, layout=7
    )


def give(recovery: Recovery, now: float) -> list[SliceKey]:
    """Lets workers give all that they are asked for; returns what."""
    given = []
    while wants := recovery.wants(now):
        for holder, key in wants:
            assert recovery.stored(holder, result(key))
            given.append(key)
    return given


def test_it_waits_for_all_that_were_there_but_not_for_ever() -> None:
    recovery = Recovery(0.0)
    recovery.add(0, standing(3, (0, 1, 2), (3, False, (0,))), 0.0)
    assert recovery.missing() == {1, 2}
    assert recovery.wants(0.1) == [] and not recovery.is_complete(0.1)
    recovery.add(1, standing(3, (0, 1)), 0.0)
    assert recovery.missing() == {2}
    assert recovery.wants(GRACE_SECONDS + 0.1) == [Want(0, SliceKey(3, 0, 0))]
    assert not recovery.is_complete(GRACE_SECONDS + 0.2)
    assert recovery.stored(0, result(SliceKey(3, 0, 0)))
    assert recovery.is_complete(GRACE_SECONDS + 0.3)


def test_a_new_process_and_a_lost_one_are_not_missing() -> None:
    recovery = Recovery(0.0)
    recovery.add(0, standing(1, (0, 1, 2)), 0.0)
    recovery.add_new(1)
    recovery.add(2, standing(1, (0, 1, 2)), 0.0)
    recovery.drop(2)
    assert recovery.missing() == set()


def test_each_result_of_the_open_run_is_asked_for_once_and_of_different_workers() -> None:
    recovery = Recovery(0.0)
    for worker in range(2):
        recovery.add(worker, standing(4, (0, 1), (4, False, (0, 1))), 0.0)
    wants = recovery.wants(0.0)
    assert {w.key for w in wants} == {SliceKey(4, 0, s) for s in range(SLICES)}
    assert {w.holder for w in wants} == {0, 1}
    assert recovery.wants(0.0) == []


def test_results_of_a_run_that_is_over_go_to_those_that_miss_them() -> None:
    recovery = Recovery(0.0)
    recovery.add(0, standing(5, (0, 1), (4, True, (0, 1))), 0.0)
    recovery.add(1, standing(4, (0, 1), (4, False, (0,))), 0.0)
    assert sorted(give(recovery, 0.0)) == [SliceKey(4, 0, 0), SliceKey(4, 0, 1)]
    restored = recovery.restored()
    assert restored.positions == {0: 5, 1: 4} and restored.exchanges == {4: 1}
    assert restored.counts[0][Fate.CONTRIBUTED] == 5
    assert set(restored.results) == {SliceKey(4, 0, s) for s in range(SLICES)}


def test_nobody_is_asked_for_what_all_have_done() -> None:
    recovery = Recovery(0.0)
    for worker in range(2):
        recovery.add(worker, standing(5, (0, 1), (4, True, (0, 1))), 0.0)
    assert give(recovery, 0.0) == [] and recovery.is_complete(0.0)
    assert recovery.restored().exchanges == {}


def test_a_gap_ends_what_is_kept() -> None:
    """The second worker misses runs 2 to 4, and nobody has the results of run 3."""
    recovery = Recovery(0.0)
    recovery.add(0, standing(5, (0, 1), (2, True, (0, 1)), (4, True, (0, 1))), 0.0)
    recovery.add(1, standing(2, (0, 1)), 0.0)
    give(recovery, 0.0)
    assert recovery.restored().exchanges == {4: 1}


def test_a_worker_that_was_not_asked_gives_nothing() -> None:
    recovery = Recovery(0.0)
    recovery.add(0, standing(4, (0, 1), (4, False, (0,))), 0.0)
    recovery.add(1, standing(4, (0, 1)), 0.0)
    assert recovery.wants(0.0) == [Want(0, SliceKey(4, 0, 0))]
    assert not recovery.stored(1, result(SliceKey(4, 0, 0)))
    assert not recovery.stored(0, result(SliceKey(4, 0, 1)))


def test_another_one_is_asked_when_a_worker_is_lost_or_silent() -> None:
    recovery = Recovery(0.0)
    for worker in range(3):
        recovery.add(worker, standing(4, (0, 1, 2), (4, False, (0,))), 0.0)
    (first,) = recovery.wants(0.0)
    recovery.drop(first.holder)
    (second,) = recovery.wants(0.0)
    assert second.holder != first.holder
    (third,) = recovery.wants(100.0)
    assert third.holder not in (first.holder, second.holder)
    recovery.drop(third.holder)
    assert recovery.wants(100.0) == [] and recovery.is_complete(100.0)
    assert recovery.restored().results == {}


@pytest.mark.parametrize("seed", range(200))
def test_what_a_living_worker_has_received_is_never_lost(seed: int) -> None:
    """Random jobs: whatever part of two runs each worker has received, and some have finished."""
    rng = random.Random(seed)
    over = rng.randint(1, 4)
    recovery = Recovery(0.0)
    everybody = tuple(range(rng.randint(1, 4)))
    last = tuple(range(SLICES))
    received: set[SliceKey] = set()
    positions = {}
    for worker in everybody:
        run = positions[worker] = over if worker == 0 else rng.randint(over - 1, over)
        part = tuple(s for s in last if rng.random() < 0.5)
        held = [(run, False, part)]
        if run == over:
            held.append((over - 1, True, last))
        recovery.add(worker, standing(run, everybody, *held), 0.0)
        received |= {SliceKey(run, 0, s) for s in part}
    give(recovery, 0.0)
    assert recovery.is_complete(0.0)
    restored = recovery.restored()
    for key in received:
        behind = any(p < over for p in positions.values())
        assert key in restored.results or (key.run < over and not behind)
    for worker, run in positions.items():
        for missed, part in itertools.product(range(run, over), last):
            assert SliceKey(missed, 0, part) in restored.results, (worker, missed)


def test_what_workers_agreed_on_about_a_slice_is_known_again() -> None:
    assert spec_of(result(SliceKey(1, 0, 1))) == SliceSpec(SLICES, "float32", 3, 7)
