"""The rounds of a job: when slices close, who is in them, and what workers may not say."""

import pytest

from tf_syncdist.aggregation.rounds import (
    Fate,
    Receipt,
    RoundError,
    Rounds,
    RunOver,
    SliceKey,
    SliceSpec,
    Verdict,
)
from tf_syncdist.cutoff import BackupWorkers, FullSync

SPEC = SliceSpec(num_slices=1, dtype="float32", elements=10, layout=7)
TWO = SPEC._replace(num_slices=2)


def backup(num_workers: int = 3, b: int = 1, **history: int) -> Rounds:
    """Rounds with backup workers."""
    return Rounds(num_workers, BackupWorkers(b), **history)


def send(
    rounds: Rounds,
    worker: int,
    run: int = 0,
    exchange: int = 0,
    index: int = 0,
    spec: SliceSpec = SPEC,
    now: float = 0.0,
) -> Receipt:
    """Contributes to one slice."""
    return rounds.contribute(worker, SliceKey(run, exchange, index), spec, now)


def do_run(rounds: Rounds, run: int, workers: list[int], spec: SliceSpec = SPEC) -> None:
    """Takes workers that are enough to close it through a run of one slice."""
    for worker in workers:
        send(rounds, worker, run, spec=spec)
    for worker in workers:
        rounds.finish(worker, run, 1, Fate.CONTRIBUTED)


def fates(rounds: Rounds, worker: int) -> tuple[int, int, int, int]:
    """Returns how often a worker contributed, was late, replayed, and was partly used."""
    counts = rounds.counts[worker]
    in_time, late = counts.fates[Fate.CONTRIBUTED], counts.fates[Fate.LATE]
    return in_time, late, counts.replayed, counts.partly_used


@pytest.mark.parametrize("num_workers, b", [(1, 0), (2, 1), (3, 0), (3, 1), (5, 2), (5, 4)])
def test_a_slice_closes_at_exactly_the_nth_contribution(num_workers: int, b: int) -> None:
    rounds = backup(num_workers, b)
    needed = num_workers - b
    assert rounds.replicas_to_aggregate == needed
    order = list(reversed(range(num_workers)))
    receipts = [send(rounds, worker) for worker in order]
    assert [bool(r.closed) for r in receipts] == [i == needed - 1 for i in range(num_workers)]
    assert [r.verdict for r in receipts] == [Verdict.ADD] * needed + [Verdict.LATE] * b
    (closed,) = receipts[needed - 1].closed
    assert closed.key == SliceKey(0, 0, 0)
    assert closed.contributors == tuple(order[:needed])
    assert closed.reason


def test_full_sync_waits_for_everybody() -> None:
    rounds = Rounds(3, FullSync())
    assert not send(rounds, 2).closed and not send(rounds, 0).closed
    assert send(rounds, 1).closed[0].contributors == (2, 0, 1)


def test_duplicates_are_not_added_before_or_after_the_slice_closed() -> None:
    rounds = backup()
    assert send(rounds, 0).verdict is Verdict.ADD
    assert send(rounds, 0) == Receipt(Verdict.DUPLICATE, (), "worker 0 is already in it")
    assert send(rounds, 1).closed
    assert send(rounds, 0).verdict is Verdict.DUPLICATE
    assert [send(rounds, 2).verdict for _ in range(2)] == [Verdict.LATE] * 2
    assert rounds.contributed(0, 0) == (1, 1) and rounds.contributed(2, 0) == (0, 1)


def test_slices_and_exchanges_come_in_any_order_and_close_on_their_own() -> None:
    rounds = backup(2, 0)
    for exchange, index in [(1, 1), (0, 1), (1, 0), (0, 0)]:
        assert not send(rounds, 0, 0, exchange, index, TWO).closed
    for exchange, index in [(0, 0), (1, 1), (0, 1), (1, 0)]:
        receipt = send(rounds, 1, 0, exchange, index, TWO)
        assert [c.key for c in receipt.closed] == [(0, exchange, index)]
    assert rounds.finish(1, 0, 2, Fate.CONTRIBUTED).over == (RunOver(0, 2),)
    assert rounds.exchanges(0) == 2 and rounds.runs_over == rounds.rounds == 1


def test_who_is_late_in_one_of_two_slices_is_late_and_partly_used() -> None:
    rounds = backup()
    for worker, index in [(0, 0), (1, 0), (2, 1), (0, 1)]:
        assert send(rounds, worker, index=index, spec=TWO).verdict is Verdict.ADD
    assert send(rounds, 2, index=0, spec=TWO).verdict is Verdict.LATE
    assert send(rounds, 1, index=1, spec=TWO).verdict is Verdict.LATE
    # The service knows better than a worker that claims to be in all slices.
    for worker, fate in [(0, Fate.CONTRIBUTED), (1, Fate.CONTRIBUTED), (2, Fate.LATE)]:
        rounds.finish(worker, 0, 1, fate)
    assert [fates(rounds, w) for w in range(3)] == [(1, 0, 0, 0), (0, 1, 0, 1), (0, 1, 0, 1)]


def test_who_is_late_on_another_shard_only_is_partly_used_too() -> None:
    """A worker in all slices of this shard says LATE, so it is in some slices and not in all."""
    rounds = backup()
    send(rounds, 0)
    send(rounds, 1)
    rounds.finish(0, 0, 1, Fate.CONTRIBUTED)
    rounds.finish(1, 0, 1, Fate.LATE)
    assert fates(rounds, 1) == (0, 1, 0, 1)


def test_who_is_late_in_all_slices_is_not_partly_used() -> None:
    rounds = backup()
    do_run(rounds, 0, [0, 1])
    assert send(rounds, 2).verdict is Verdict.LATE
    assert rounds.finish(2, 0, 1, Fate.LATE).over == ()
    assert fates(rounds, 2) == (0, 1, 0, 0)


def test_a_replay_changes_nothing_but_the_workers_count_and_position() -> None:
    rounds = backup()
    do_run(rounds, 0, [0, 1])
    assert rounds.position(2) == 0
    rounds.finish(2, 0, 1, Fate.REPLAYED)
    assert rounds.position(2) == 1 and rounds.runs_over == rounds.rounds == 1
    assert fates(rounds, 2) == (0, 0, 1, 0)


def test_missed_rounds_count_as_replayed_and_need_not_know_the_number_of_exchanges() -> None:
    rounds = backup()
    do_run(rounds, 0, [0, 1])
    rounds.finish(2, 0, 17, Fate.MISSED)
    assert fates(rounds, 2) == (0, 0, 1, 0) and rounds.counts[2].fates[Fate.MISSED] == 1


@pytest.mark.parametrize("run", [0, 2, 2**63])
def test_only_the_run_that_a_worker_is_in_can_be_talked_about(run: int) -> None:
    rounds = backup()
    do_run(rounds, 0, [0, 1])
    match = f"worker 0 to .* run 1, .*Received: run={run}"
    with pytest.raises(RoundError, match=match):
        send(rounds, 0, run)
    with pytest.raises(RoundError, match=match):
        rounds.late(0, run, 0.0)
    with pytest.raises(RoundError, match=match):
        rounds.finish(0, run, 1, Fate.CONTRIBUTED)
    assert rounds.position(0) == 1 and rounds.runs_over == 1


@pytest.mark.parametrize(
    "wrong, named",
    [
        (TWO._replace(dtype="int32"), "10 x int32"),
        (TWO._replace(elements=11), "11 x float32"),
        (TWO._replace(layout=8), "layout 0000000000000008"),
        (TWO._replace(num_slices=3), "3 slice"),
    ],
)
def test_workers_must_agree_on_a_slice(wrong: SliceSpec, named: str) -> None:
    rounds = backup()
    send(rounds, 0, spec=TWO)
    with pytest.raises(RoundError, match="worker 1") as error:
        send(rounds, 1, spec=wrong)
    assert named in str(error.value) and "10 x float32 in 2 slice" in str(error.value)
    # Nothing was taken, and the worker may not slip in by another slice either.
    assert rounds.contributed(1, 0) == (0, 1)
    if wrong.layout != TWO.layout or wrong.num_slices != TWO.num_slices:
        with pytest.raises(RoundError):
            send(rounds, 1, index=1, spec=wrong)


def test_slices_of_one_exchange_may_differ_in_size_and_dtype() -> None:
    rounds = backup(2, 0)
    other = TWO._replace(elements=3, dtype="int64")
    for worker in range(2):
        assert send(rounds, worker, index=0, spec=TWO).verdict is Verdict.ADD
        assert send(rounds, worker, index=1, spec=other).verdict is Verdict.ADD
    assert rounds.history_size == 10 * 4 + 3 * 8


@pytest.mark.parametrize("index, num_slices", [(1, 1), (2, 2), (-1, 2), (0, 0)])
def test_a_slice_beyond_the_number_of_slices_is_refused(index: int, num_slices: int) -> None:
    with pytest.raises(RoundError, match=f"slice={index} .*from worker 0"):
        send(backup(), 0, index=index, spec=SPEC._replace(num_slices=num_slices))


@pytest.mark.parametrize("worker", [3, -1, 1])
def test_unknown_and_departed_workers_are_refused(worker: int) -> None:
    rounds = backup()
    rounds.leave(1, 0.0)
    for act in (
        lambda: send(rounds, worker),
        lambda: rounds.late(worker, 0, 0.0),
        lambda: rounds.finish(worker, 0, 1, Fate.CONTRIBUTED),
    ):
        with pytest.raises(RoundError, match=rf"\[0, 2\].*worker={worker}"):
            act()


def test_a_run_with_open_or_unseen_slices_cannot_be_finished() -> None:
    rounds = backup()
    send(rounds, 0, index=0, spec=TWO)
    with pytest.raises(RoundError, match="0 of 2 are closed"):
        rounds.finish(0, 0, 1, Fate.CONTRIBUTED)
    send(rounds, 1, index=0, spec=TWO)
    with pytest.raises(RoundError, match="1 of 2 are closed"):
        rounds.finish(0, 0, 1, Fate.CONTRIBUTED)
    assert rounds.runs_over == rounds.position(0) == 0


def test_all_workers_must_have_the_same_number_of_exchanges() -> None:
    rounds = backup()
    for exchange in range(2):
        for worker in range(2):
            send(rounds, worker, 0, exchange)
    with pytest.raises(RoundError, match="2 or more exchange.*Received: exchanges=1"):
        rounds.finish(0, 0, 1, Fate.CONTRIBUTED)
    rounds.finish(0, 0, 2, Fate.CONTRIBUTED)
    for exchanges in (1, 3):
        with pytest.raises(RoundError, match=f"2 exchange.*Received: exchanges={exchanges}"):
            rounds.finish(1, 0, exchanges, Fate.CONTRIBUTED)
    with pytest.raises(RoundError, match="2 exchange.*Received: exchange=2"):
        send(rounds, 2, 0, 2)


def test_a_slice_that_an_over_run_did_not_have_is_refused() -> None:
    """A shard that had no slice of an exchange must not open one after the run is over."""
    rounds = backup()
    rounds.finish(0, 0, 1, Fate.CONTRIBUTED)
    try:
        receipt = send(rounds, 1)
    except RoundError:
        return
    assert receipt.verdict is not Verdict.ADD


def test_a_run_without_exchange_is_no_round_and_is_over_with_the_next_that_has_one() -> None:
    rounds = backup()
    assert rounds.finish(0, 0, 0, Fate.CONTRIBUTED).over == ()
    with pytest.raises(RoundError, match="0 exchange"):
        rounds.finish(1, 0, 1, Fate.CONTRIBUTED)
    with pytest.raises(RoundError, match="0 exchange"):
        send(rounds, 1)
    for worker in (1, 2):
        assert rounds.finish(worker, 0, 0, Fate.CONTRIBUTED).over == ()
    for worker in (1, 2):
        send(rounds, worker, run=1)
    assert rounds.finish(1, 1, 1, Fate.CONTRIBUTED).over == (RunOver(0, 0), RunOver(1, 1))
    assert rounds.finish(2, 1, 1, Fate.CONTRIBUTED).over == ()
    assert (rounds.runs_over, rounds.rounds) == (2, 1)
    assert [fates(rounds, w) for w in range(3)] == [(0,) * 4, (1, 0, 0, 0), (1, 0, 0, 0)]
