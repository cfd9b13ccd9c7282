"""Rounds whose cutoff is planned, closed by a timer, or left to a policy that fails."""

import math

import numpy as np
import pytest

from tf_syncdist.aggregation.rounds import Fate, Receipt, Rounds, SliceKey, SliceSpec, Verdict
from tf_syncdist.cutoff import BackupWorkers, Decision, FullSync, Plan, RoundTimes, SliceView

SPEC = SliceSpec(num_slices=1, dtype="float32", elements=10, layout=7)
TWO = SPEC._replace(num_slices=2)


class Planned(FullSync):
    """Closes with as many as are planned."""

    def decide(self, view: SliceView) -> Decision:
        count = view.num_workers if view.plan is None else view.plan.count
        close = view.contributions >= max(1, min(count, view.possible))
        return Decision(close, None, "planned")


class Timer(FullSync):
    """Closes two seconds after the first contribution to the round."""

    def decide(self, view: SliceView) -> Decision:
        until = view.opened_at + 2.0
        close = view.contributions == view.possible or view.now >= until
        return Decision(close, None if close else until, "time is up")


class Broken(FullSync):
    """Fails from its third decision on."""

    def __init__(self, answer: object = None) -> None:
        object.__setattr__(self, "asked", 0)
        object.__setattr__(self, "answer", answer)

    def decide(self, view: SliceView) -> Decision:
        object.__setattr__(self, "asked", self.asked + 1)
        if self.asked < 3:
            return Decision(False, None, "wait")
        if self.answer is None:
            raise ZeroDivisionError("of the test")
        return self.answer


def send(
    rounds: Rounds,
    worker: int,
    run: int = 0,
    now: float = 0.0,
    elapsed: float = 0.0,
    index: int = 0,
    spec: SliceSpec = SPEC,
    exchange: int = 0,
) -> Receipt:
    """Contributes to one slice."""
    return rounds.contribute(worker, SliceKey(run, exchange, index), spec, now, elapsed)


def plan(count: int) -> Plan:
    """Returns a plan."""
    return Plan(count, None, f"{count} of the test")


def times_of(rounds: Rounds, run: int, worker: int = 0, exchanges: int = 1) -> RoundTimes:
    """Ends a run and returns how long everybody took."""
    (times,) = rounds.finish(worker, run, exchanges, Fate.CONTRIBUTED).times
    return times


# Times.


def test_times_count_from_the_closing_of_the_round_before() -> None:
    rounds = Rounds(3, BackupWorkers(1))
    send(rounds, 0, now=10.0, elapsed=3.0)
    send(rounds, 1, now=12.0, elapsed=4.0)
    times = times_of(rounds, 0)
    assert times.run == 0
    # Nothing is known of what was before, so the round began with the first worker, at 7.
    np.testing.assert_allclose(times.seconds, [3.0, 5.0, np.nan])
    assert times.closed_seconds == 5.0 and times.present.tolist() == [True] * 3
    rounds.finish(1, 0, 1, Fate.CONTRIBUTED)
    # They have begun it before the round before was closed, as they may by their own clocks.
    send(rounds, 1, run=1, now=13.0, elapsed=1.5)
    send(rounds, 0, run=1, now=14.5, elapsed=2.0)
    times = times_of(rounds, 1)
    np.testing.assert_allclose(times.seconds, [2.5, 1.0, np.nan])
    assert times.closed_seconds == 2.5


def test_time_that_all_spend_elsewhere_does_not_count() -> None:
    rounds = Rounds(2, FullSync())
    for worker in range(2):
        send(rounds, worker, now=1.0)
    for worker in range(2):
        rounds.finish(worker, 0, 1, Fate.CONTRIBUTED)
    send(rounds, 0, run=1, now=101.0, elapsed=1.0)
    send(rounds, 1, run=1, now=102.0, elapsed=0.5)
    np.testing.assert_allclose(times_of(rounds, 1).seconds, [1.0, 2.0])


def test_the_last_of_a_workers_slices_counts_and_who_has_not_sent_all_has_no_time() -> None:
    rounds = Rounds(3, BackupWorkers(1))
    for worker, index, now in [(0, 0, 1.0), (0, 1, 2.0), (1, 0, 3.0), (2, 1, 4.0)]:
        send(rounds, worker, now=now, elapsed=now, index=index, spec=TWO)
    times = times_of(rounds, 0)
    np.testing.assert_allclose(times.seconds, [2.0, np.nan, np.nan])
    assert times.closed_seconds == 4.0 and times.present.all()


def test_who_is_late_has_a_time_if_it_comes_before_the_round_is_over() -> None:
    rounds = Rounds(4, BackupWorkers(2))
    for worker, now in [(0, 1.0), (1, 2.0), (2, 3.0)]:
        verdict = send(rounds, worker, now=now, elapsed=now).verdict
        assert verdict is (Verdict.LATE if worker == 2 else Verdict.ADD)
    times = times_of(rounds, 0)
    np.testing.assert_allclose(times.seconds, [1.0, 2.0, 3.0, np.nan])
    assert times.closed_seconds == 2.0
    send(rounds, 3, now=9.0)
    assert rounds.finish(3, 0, 1, Fate.LATE).times == ()


def test_a_slice_that_is_sent_again_does_not_count_twice() -> None:
    rounds = Rounds(2, BackupWorkers(1))
    send(rounds, 0, now=1.0, elapsed=1.0, spec=TWO)
    send(rounds, 0, now=2.0, elapsed=2.0, spec=TWO)
    send(rounds, 1, now=3.0, elapsed=3.0, spec=TWO, index=1)
    assert np.isnan(times_of(rounds, 0).seconds[0])


def test_who_keeps_its_values_back_has_taken_its_time_for_them() -> None:
    rounds = Rounds(2, FullSync())
    send(rounds, 0, now=1.0, elapsed=1.0)
    (closed,) = rounds.late(1, 0, 3.0, 3.0)
    assert closed.contributors == (0,)
    np.testing.assert_allclose(times_of(rounds, 0).seconds, [1.0, 3.0])


def test_who_cannot_take_part_is_not_present() -> None:
    rounds = Rounds(5, FullSync())
    rounds.leave(1, 0.0)
    rounds.silence(2, 0.0)
    rounds.suspend(3, 0.0)
    rounds.abstain(4, 0, 0.0)
    send(rounds, 0, now=1.0)
    assert times_of(rounds, 0).present.tolist() == [True, False, False, False, False]


def test_gradient_accumulation_takes_as_long_as_all_of_its_runs() -> None:
    rounds = Rounds(1, FullSync())
    assert rounds.finish(0, 0, 0, Fate.CONTRIBUTED).times == ()
    send(rounds, 0, run=1, now=5.0, elapsed=5.0)
    send(rounds, 0, run=1, now=6.0, elapsed=6.0, exchange=1)
    assert times_of(rounds, 1, exchanges=2).seconds.tolist() == [6.0]


def test_nothing_is_said_of_a_round_that_another_process_has_begun() -> None:
    rounds = Rounds(2, FullSync())
    counts = {w: dict.fromkeys(Fate, 0) for w in range(2)}
    rounds.restore({0: 3, 1: 3}, counts, {}, [(SliceKey(3, 0, 0), TWO, (0, 1))])
    for worker in range(2):
        send(rounds, worker, run=3, now=1.0, index=1, spec=TWO)
    assert rounds.finish(0, 3, 1, Fate.CONTRIBUTED).times == ()
    rounds.finish(1, 3, 1, Fate.CONTRIBUTED)
    send(rounds, 0, run=4, now=2.0, elapsed=1.0)
    send(rounds, 1, run=4, now=3.0)
    np.testing.assert_allclose(times_of(rounds, 4).seconds, [1.0, 2.0])


# Plans.


def test_a_plan_made_before_the_first_contribution_closes_the_round() -> None:
    rounds = Rounds(3, Planned())
    assert rounds.set_plan(0, plan(2), 0.0) == ()
    assert rounds.plan == (0, plan(2))
    assert not send(rounds, 2).closed
    assert send(rounds, 0).closed[0].contributors == (2, 0)


def test_without_a_plan_all_are_waited_for_and_a_plan_that_comes_late_closes_at_once() -> None:
    rounds = Rounds(3, Planned())
    for index in range(2):
        assert not send(rounds, 0, index=index, spec=TWO).closed
    assert not send(rounds, 1, spec=TWO).closed
    closed = rounds.set_plan(0, plan(1), 1.0)
    assert [(c.key.slice, c.contributors) for c in closed] == [(0, (0, 1)), (1, (0,))]


def test_only_the_first_plan_for_a_round_counts() -> None:
    rounds = Rounds(3, Planned())
    rounds.set_plan(0, plan(3), 0.0)
    rounds.set_plan(0, plan(1), 0.0)
    assert not send(rounds, 0).closed and rounds.plan == (0, plan(3))


def test_a_plan_is_for_the_first_round_from_its_run_on() -> None:
    rounds = Rounds(2, Planned(), follows=True)
    rounds.set_plan(0, plan(1), 0.0)
    for worker in range(2):
        rounds.finish(worker, 0, 0, Fate.CONTRIBUTED)
    # Another shard may be ahead of this one.
    rounds.set_plan(2, plan(2), 0.0)
    assert send(rounds, 0, run=1).closed
    rounds.finish(0, 1, 1, Fate.CONTRIBUTED)
    assert rounds.plan == (2, plan(2))
    assert not send(rounds, 0, run=2).closed
    assert rounds.set_plan(1, plan(1), 0.0) == (), "that round is over"
    rounds.finish(1, 1, 1, Fate.REPLAYED)
    assert send(rounds, 1, run=2).closed


def test_plans_do_not_pile_up_on_a_shard_without_slices() -> None:
    rounds = Rounds(1, Planned(), follows=True)
    for run in range(100):
        rounds.set_plan(run, plan(1), 0.0)
        assert rounds.plan == (run, plan(1))
        rounds.finish(0, run, 1, Fate.CONTRIBUTED)


@pytest.mark.parametrize("follows", [False, True])
def test_a_round_does_not_wait_for_a_plan_that_is_still_being_made(follows: bool) -> None:
    rounds = Rounds(3, Planned(), follows=follows)
    rounds.set_plan(0, plan(2), 0.0)
    for worker in range(2):
        send(rounds, worker)
    for worker in range(2):
        rounds.finish(worker, 0, 1, Fate.CONTRIBUTED)
    assert rounds.plan is None and rounds.last_plan == (None if follows else plan(2))
    assert not send(rounds, 0, run=1).closed
    assert bool(send(rounds, 1, run=1).closed) is not follows
    assert rounds.plan == (None if follows else (1, plan(2)))


def test_plans_are_bounded_by_what_is_possible_and_by_min_workers() -> None:
    rounds = Rounds(3, Planned(), min_workers=2)
    rounds.set_plan(0, plan(3), 0.0)
    rounds.leave(2, 0.0)
    assert not send(rounds, 0).closed
    assert send(rounds, 1).closed
    for worker in range(2):
        rounds.finish(worker, 0, 1, Fate.CONTRIBUTED)
    rounds.set_plan(1, plan(1), 0.0)
    rounds.leave(1, 0.0, for_good=False)
    assert not send(rounds, 0, run=1).closed
    rounds.enter(1, 1)
    assert rounds.tick(1.0)[0].contributors == (0,)


# Timers.


def test_wake_at_tells_when_to_ask_again() -> None:
    rounds = Rounds(3, Timer())
    assert rounds.wake_at is None
    send(rounds, 0, now=1.0, index=0, spec=TWO)
    assert rounds.wake_at == 3.0
    send(rounds, 1, now=1.5, elapsed=1.0, index=1, spec=TWO)
    assert rounds.tick(2.9) == ()
    assert rounds.wake_at == 3.0
    assert len(rounds.tick(3.0)) == 2
    assert rounds.wake_at is None
    rounds.finish(0, 0, 1, Fate.CONTRIBUTED)
    send(rounds, 0, run=1, now=4.0)
    assert rounds.wake_at == 6.0
    rounds.leave(1, 4.0)
    rounds.leave(2, 4.0)
    assert rounds.wake_at is None


# Failures.


@pytest.mark.parametrize(
    "answer", [None, 7, Decision(False, math.nan, ""), Decision(False, "soon", "")]
)
def test_full_sync_takes_over_from_a_policy_that_fails(answer: object) -> None:
    rounds = Rounds(3, Broken(answer))
    send(rounds, 0)
    send(rounds, 1)
    assert not rounds.cutoff.failure
    assert send(rounds, 2).closed
    assert "Broken could not decide" in rounds.cutoff.failure
    failure = rounds.cutoff.failure
    for worker in range(3):
        rounds.finish(worker, 0, 1, Fate.CONTRIBUTED)
    assert [bool(send(rounds, w, run=1).closed) for w in range(3)] == [False, False, True]
    assert rounds.cutoff.failure == failure
