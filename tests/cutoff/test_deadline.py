"""The cutoff by time."""

import pytest

from tf_syncdist.cutoff import Deadline, SliceView


def view(seconds: float, contributions: int, possible: int = 8) -> SliceView:
    """A slice of a round of eight workers that was opened at 100 s."""
    return SliceView(100 + seconds, 100.0, contributions, possible, 8)


def test_a_round_waits_until_the_time_is_up() -> None:
    policy = Deadline(2.5)
    decision = policy.decide(view(1.0, 5))
    assert not decision.close
    assert decision.wait_until == 102.5
    assert "5 of 8" in decision.reason and "1.5 s" in decision.reason
    # Asked at the very time for which it has asked to be.
    decision = policy.decide(view(2.5, 5))
    assert decision.close
    assert decision.reason == "the 2.5 s are over with 5 of 8"


def test_nobody_waits_for_a_time_in_which_nothing_more_can_come() -> None:
    assert Deadline(2.5).decide(view(0.1, 8)).close
    assert Deadline(2.5).decide(view(0.1, 3, possible=3)).close
    assert not Deadline(2.5).decide(view(0.1, 0, possible=0)).close


@pytest.mark.parametrize(("min_fraction", "least"), [(0.01, 1), (0.25, 2), (0.3, 3), (1, 8)])
def test_a_round_closes_with_no_fewer_than_the_least_workers(
    min_fraction: float, least: int
) -> None:
    policy = Deadline(1.0, min_fraction)
    for contributions in range(1, 9):
        decision = policy.decide(view(3.0, contributions))
        assert decision.close == (contributions >= least)
        # Then it is an arrival that closes it.
        assert decision.wait_until is None
    # Of two workers that are left more than two cannot come.
    assert policy.decide(view(3.0, 2, possible=2)).close


@pytest.mark.parametrize("seconds", [0, -1, "1", None, True, float("nan"), float("inf")])
def test_seconds_that_are_none_are_refused(seconds: object) -> None:
    with pytest.raises(ValueError, match="`seconds`") as error:
        Deadline(seconds)
    assert f"seconds={seconds!r}" in str(error.value)
