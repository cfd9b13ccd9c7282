"""The rounds of a job: which results are kept, who left, and who was how late."""

import pytest

from tf_syncdist.aggregation.rounds import Fate, Receipt, Rounds, SliceKey, SliceSpec, Verdict
from tf_syncdist.cutoff import BackupWorkers, FullSync

SPEC = SliceSpec(num_slices=1, dtype="float32", elements=10, layout=7)
RUN_BYTES = 40


def send(rounds: Rounds, worker: int, run: int) -> Receipt:
    """Contributes to the only slice of a run."""
    return rounds.contribute(worker, SliceKey(run, 0, 0), SPEC, 0.0)


def do_run(rounds: Rounds, run: int, workers: list[int], exchanges: int = 1) -> list[int]:
    """Takes workers that are enough to close it through a run; returns what was evicted."""
    evicted: list[int] = []
    for exchange in range(exchanges):
        for worker in workers:
            rounds.contribute(worker, SliceKey(run, exchange, 0), SPEC, 0.0)
    for worker in workers:
        evicted += rounds.finish(worker, run, exchanges, Fate.CONTRIBUTED).evicted
    return evicted


def test_results_are_kept_until_the_slowest_present_worker_has_done_them() -> None:
    rounds = Rounds(3, BackupWorkers(1), history_rounds=1, history_bytes=10**6)
    for run in range(5):
        assert do_run(rounds, run, [0, 1]) == []
    assert rounds.kept_from == 0 and rounds.history_size == 5 * RUN_BYTES
    for run in range(5):
        assert rounds.exchanges(run) == 1
        assert rounds.finish(2, run, 1, Fate.REPLAYED).evicted == (run,)
        assert rounds.kept_from == run + 1
    assert rounds.history_size == 0


@pytest.mark.parametrize(
    "history_rounds, history_bytes, kept",
    [
        (4, 0, 4),
        (1, 0, 1),
        (1, 3 * RUN_BYTES, 3),
        (1, 3 * RUN_BYTES - 1, 2),
        (3, RUN_BYTES, 3),
        (0, 0, 0),
        (100, 0, 10),
        (0, 10**9, 10),
    ],
)
def test_the_larger_of_both_limits_counts(
    history_rounds: int, history_bytes: int, kept: int
) -> None:
    rounds = Rounds(3, BackupWorkers(1), history_rounds, history_bytes)
    evicted = [run for number in range(10) for run in do_run(rounds, number, [0, 1])]
    assert evicted == list(range(10 - kept))
    assert rounds.kept_from == 10 - kept
    assert rounds.history_size == kept * RUN_BYTES


def test_runs_without_exchange_do_not_use_up_the_rounds_that_are_kept() -> None:
    """Gradient accumulation has many runs per round, and `history_rounds` counts rounds."""
    rounds = Rounds(3, BackupWorkers(1), history_rounds=2, history_bytes=0)
    for run in range(12):
        do_run(rounds, run, [0, 1], exchanges=int(run % 4 == 0))
    assert rounds.rounds == 3
    # Rounds 4 and 8 are the last two.
    assert rounds.kept_from <= 4


def test_values_for_a_run_whose_results_are_gone_are_late_and_may_be_counted() -> None:
    rounds = Rounds(3, BackupWorkers(1), history_rounds=1, history_bytes=0)
    for run in range(3):
        do_run(rounds, run, [0, 1])
    assert rounds.kept_from == 2
    receipt = rounds.contribute(2, SliceKey(0, 0, 0), SPEC, 1.0)
    assert receipt.verdict is Verdict.LATE and not receipt.closed
    rounds.late(2, 0, 1.0)
    rounds.finish(2, 0, 1, Fate.LATE)
    rounds.finish(2, 1, 1, Fate.MISSED)
    rounds.finish(2, 2, 1, Fate.REPLAYED)
    counts = rounds.counts[2]
    assert (counts.fates[Fate.LATE], counts.replayed, counts.partly_used) == (1, 2, 0)
    assert rounds.kept_from == 3 and rounds.history_size == 0


def test_nobody_needs_results_once_the_slow_worker_has_left() -> None:
    rounds = Rounds(3, BackupWorkers(1))
    for run in range(4):
        do_run(rounds, run, [0, 1])
    assert rounds.leave(2, 0.0) == ()
    assert do_run(rounds, 4, [0, 1]) == [0, 1, 2, 3, 4]


def test_leaving_closes_what_waits_for_the_leaver_alone() -> None:
    rounds = Rounds(3, FullSync())
    two = SPEC._replace(num_slices=2)
    for worker in range(2):
        rounds.contribute(worker, SliceKey(0, 0, 0), two, 0.0)
    rounds.contribute(0, SliceKey(0, 0, 1), two, 0.0)
    (closed,) = rounds.leave(2, 0.0)
    assert closed.key == SliceKey(0, 0, 0) and closed.contributors == (0, 1)
    assert "2 of 3" in closed.reason
    assert rounds.leave(2, 0.0) == ()
    (closed,) = rounds.contribute(1, SliceKey(0, 0, 1), two, 0.0).closed
    assert closed.contributors == (0, 1)


def test_what_a_leaver_had_contributed_stays_in() -> None:
    rounds = Rounds(3, FullSync())
    rounds.contribute(2, SliceKey(0, 0, 0), SPEC, 0.0)
    assert rounds.leave(2, 0.0) == ()
    assert not rounds.contribute(0, SliceKey(0, 0, 0), SPEC, 0.0).closed
    (closed,) = rounds.contribute(1, SliceKey(0, 0, 0), SPEC, 0.0).closed
    assert closed.contributors == (2, 0, 1)


def test_the_cutoff_stays_n_while_enough_workers_are_left_and_shrinks_then() -> None:
    rounds = Rounds(4, BackupWorkers(2))
    rounds.leave(3, 0.0)
    assert do_run(rounds, 0, [0, 1]) == []
    rounds.leave(2, 0.0)
    assert do_run(rounds, 1, [1, 0]) == [0, 1]
    rounds.leave(1, 0.0)
    (closed,) = rounds.contribute(0, SliceKey(2, 0, 0), SPEC, 0.0).closed
    assert closed.contributors == (0,)
    # The scale of all_reduce(SUM) is that of the whole job all the same.
    assert rounds.replicas_to_aggregate == 2


def test_a_departed_worker_closes_open_slices_even_when_it_was_the_last() -> None:
    rounds = Rounds(2, FullSync())
    rounds.contribute(0, SliceKey(0, 0, 0), SPEC, 0.0)
    assert rounds.leave(0, 0.0) == ()
    (closed,) = rounds.leave(1, 0.0)
    assert closed.contributors == (0,)


def test_missing_names_present_workers_that_have_sent_nothing() -> None:
    rounds = Rounds(4, BackupWorkers(1))
    assert rounds.missing(0) == [0, 1, 2, 3]
    rounds.contribute(2, SliceKey(0, 0, 0), SPEC, 0.0)
    rounds.late(3, 0, 0.0)
    assert rounds.missing(0) == [0, 1]
    rounds.leave(1, 0.0)
    assert rounds.missing(0) == [0]


def test_the_delay_is_that_of_the_first_message_of_a_round_behind_the_first_workers() -> None:
    rounds = Rounds(3, BackupWorkers(1))
    two = SPEC._replace(num_slices=2)
    for worker, index, now in [(1, 0, 10.0), (0, 0, 10.5), (1, 1, 50.0), (0, 1, 60.0)]:
        rounds.contribute(worker, SliceKey(0, 0, index), two, now)
    rounds.late(2, 0, 14.0)
    rounds.late(2, 0, 20.0)
    for worker, fate in [(0, Fate.CONTRIBUTED), (1, Fate.CONTRIBUTED), (2, Fate.LATE)]:
        rounds.finish(worker, 0, 1, fate)
    rounds.contribute(2, SliceKey(1, 0, 0), SPEC, 100.0)
    rounds.contribute(0, SliceKey(1, 0, 0), SPEC, 101.0)
    rounds.finish(0, 1, 1, Fate.CONTRIBUTED)
    rounds.finish(1, 1, 1, Fate.REPLAYED)
    counts = rounds.counts
    assert [c.mean_delay_seconds for c in counts] == [0.75, 0.0, 2.0]
    # A replayed round says nothing about a worker's speed.
    assert [c.delays for c in counts] == [2, 1, 2]


def test_who_has_not_arrived_has_no_delay() -> None:
    assert Rounds(2, FullSync()).counts[0].mean_delay_seconds == 0.0


def test_no_round_waits_for_a_worker_that_waits_for_a_state() -> None:
    """Until it has one, and is heard of in a round."""
    rounds = Rounds(3, BackupWorkers(0))
    do_run(rounds, 0, [0, 1, 2])
    for worker in (0, 1):
        send(rounds, worker, run=1)
    (closed,) = rounds.suspend(2, 0.0)
    assert closed.contributors == (0, 1)
    # It had sent this before it asked; the request was on a faster way.
    send(rounds, 2, run=1)
    for worker in (0, 1):
        rounds.finish(worker, 1, 1, Fate.CONTRIBUTED)
    assert not send(rounds, 0, run=2).closed
    assert send(rounds, 1, run=2).closed
    for worker in (0, 1):
        rounds.finish(worker, 2, 1, Fate.CONTRIBUTED)
    rounds.resume(2, 3, missed=1)
    send(rounds, 0, run=3)
    # It still catches up.
    assert send(rounds, 1, run=3).closed
    send(rounds, 2, run=3)
    for worker in (0, 1, 2):
        rounds.finish(worker, 3, 1, Fate.CONTRIBUTED)
    for worker in (0, 1):
        assert not send(rounds, worker, run=4).closed
    assert send(rounds, 2, run=4).closed


def test_who_comes_back_without_asking_again_has_a_state() -> None:
    """It may have got it when the connection broke."""
    rounds = Rounds(2, BackupWorkers(0))
    do_run(rounds, 0, [0, 1])
    rounds.suspend(1, 0.0)
    rounds.leave(1, 0.0, for_good=False)
    rounds.enter(1, 1)
    assert send(rounds, 0, run=1).closed
    assert not send(rounds, 1, run=1).closed
    for worker in (0, 1):
        rounds.finish(worker, 1, 1, Fate.CONTRIBUTED)
    assert not send(rounds, 0, run=2).closed
    assert send(rounds, 1, run=2).closed


def test_a_job_ends_after_the_round_that_somebody_may_have_begun() -> None:
    rounds = Rounds(3, BackupWorkers(1))
    assert rounds.end(7) == 7
    assert rounds.end(0) == 1, "somebody may be computing for round 0"
    do_run(rounds, 0, [0, 1])
    assert rounds.end(1) == 2
    send(rounds, 0, run=1)
    assert rounds.end(1) == 2, "nothing is closed in round 1"
    send(rounds, 1, run=1)
    assert rounds.end(1) == 3, "who has the result of round 1 may be computing for round 2"
