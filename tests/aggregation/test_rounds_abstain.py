"""Rounds with workers that have said that they will not take part in one."""

from tf_syncdist.aggregation.rounds import Fate, Receipt, Rounds, SliceKey, SliceSpec, Verdict
from tf_syncdist.cutoff import BackupWorkers, FullSync

SPEC = SliceSpec(num_slices=1, dtype="float32", elements=10, layout=7)


def send(rounds: Rounds, worker: int, run: int = 0) -> Receipt:
    """Contributes to the only slice of a run."""
    return rounds.contribute(worker, SliceKey(run, 0, 0), SPEC, 0.0)


def test_a_round_does_not_wait_for_who_abstains() -> None:
    rounds = Rounds(3, FullSync())
    assert rounds.abstain(2, 0, 0.0) == ()
    assert not send(rounds, 0).closed
    assert send(rounds, 1).closed[0].contributors == (0, 1)


def test_abstaining_closes_what_has_waited_for_it() -> None:
    rounds = Rounds(3, FullSync())
    send(rounds, 0)
    assert rounds.abstain(2, 0, 0.0) == ()
    (closed,) = rounds.abstain(1, 0, 0.0)
    assert closed.contributors == (0,)


def test_the_other_rounds_wait() -> None:
    rounds = Rounds(2, FullSync())
    rounds.abstain(1, 1, 0.0)
    assert not send(rounds, 0).closed
    assert send(rounds, 1).closed
    for worker in (0, 1):
        rounds.finish(worker, 0, 1, Fate.CONTRIBUTED)
    assert send(rounds, 0, 1).closed
    rounds.finish(0, 1, 1, Fate.CONTRIBUTED)
    rounds.finish(1, 1, 1, Fate.REPLAYED)
    assert not send(rounds, 0, 2).closed
    assert send(rounds, 1, 2).closed


def test_backup_workers_are_waited_for_as_long_as_they_can_come() -> None:
    rounds = Rounds(4, BackupWorkers(1))
    rounds.abstain(3, 0, 0.0)
    assert not send(rounds, 0).closed and not send(rounds, 1).closed
    assert send(rounds, 2).closed[0].contributors == (0, 1, 2)


def test_who_takes_part_after_all_is_in_it() -> None:
    """A promise for an input pass that has ended does not bind in the next one."""
    rounds = Rounds(3, FullSync())
    rounds.abstain(2, 0, 0.0)
    assert send(rounds, 2).verdict is Verdict.ADD
    assert not send(rounds, 0).closed
    assert send(rounds, 1).closed[0].contributors == (2, 0, 1)


def test_it_is_harmless_where_it_comes_too_late() -> None:
    rounds = Rounds(2, BackupWorkers(1))
    send(rounds, 0)
    rounds.finish(0, 0, 1, Fate.CONTRIBUTED)
    assert rounds.abstain(1, 0, 0.0) == ()
    rounds.finish(1, 0, 1, Fate.REPLAYED)
    rounds.leave(1, 0.0)
    assert rounds.abstain(1, 5, 0.0) == ()


def test_nobody_is_said_to_wait_for_who_abstains() -> None:
    rounds = Rounds(3, FullSync())
    assert rounds.arrived(0) == 0
    send(rounds, 0)
    rounds.abstain(2, 0, 0.0)
    assert rounds.missing(0) == [1] and rounds.arrived(0) == 1


def test_who_waits_for_a_state_still_does() -> None:
    """The promise comes from another thread than that which waits."""
    rounds = Rounds(3, FullSync())
    rounds.suspend(2, 0.0)
    rounds.abstain(2, 5, 0.0)
    assert not send(rounds, 0).closed
    assert send(rounds, 1).closed


def test_in_the_next_pass_everybody_is_waited_for() -> None:
    rounds = Rounds(2, FullSync())
    for worker in (0, 1):
        rounds.abstain(worker, 0, 0.0)
    rounds.forget_abstentions()
    assert not send(rounds, 0).closed
    assert send(rounds, 1).closed


def test_what_is_late_in_one_exchange_is_not_waited_for_in_the_next() -> None:
    rounds = Rounds(3, BackupWorkers(1))
    for worker in (0, 1):
        send(rounds, worker)
    assert rounds.late(2, 0, 0.0) == ()
    following = SliceKey(0, 1, 0)
    assert not rounds.contribute(0, following, SPEC, 0.0).closed
    (closed,) = rounds.leave(1, 0.0)
    assert closed.key == following and closed.contributors == (0,)


def test_being_late_closes_what_has_waited_for_it() -> None:
    rounds = Rounds(2, FullSync())
    send(rounds, 0)
    (closed,) = rounds.late(1, 0, 0.0)
    assert closed.contributors == (0,)
