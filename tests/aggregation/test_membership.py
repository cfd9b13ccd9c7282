"""Lives of workers, silence and detection."""

import pytest

from tf_syncdist.aggregation.membership import AWAY_SECONDS, Changes, Members, NotAdmitted

NOTHING = Changes((), (), ())


def members(detection_seconds: float = 3.0, count: int = 3) -> Members:
    """Workers that have all come at time 0."""
    found = Members(count, detection_seconds)
    for worker in range(count):
        assert not found.admit(worker, 100 + worker, f"host:{worker}", 0.0)
    return found


def test_a_worker_is_silent_until_it_is_heard_of() -> None:
    found = members()
    found.hear(0, 3.5)
    assert found.tick(3.9) == Changes((1, 2), (), ())
    assert found.tick(4.0) == NOTHING
    found.hear(1, 4.5)
    assert found.tick(5.0) == Changes((), (1,), ())
    assert found.here == {0, 1} and found.have_come == {0, 1, 2}


@pytest.mark.parametrize(
    "detection, round_seconds, expected",
    [(3.0, 0.001, 1.0), (3.0, 0.006, 1.8), (3.0, 1.0, 3.0), (0.5, 0.001, 0.5), (90.0, 0.1, 30.0)],
)
def test_detection_is_a_multiple_of_recent_rounds_but_a_second_at_least(
    detection: float, round_seconds: float, expected: float
) -> None:
    found = members(detection)
    assert found.patience_seconds() == detection
    for number in range(100):
        found.round_ended(number * round_seconds)
    assert found.patience_seconds() == pytest.approx(expected)


def test_one_long_round_does_not_change_it() -> None:
    found = members()
    now = 0.0
    for number in range(30):
        now += 100.0 if number == 20 else 0.006
        found.round_ended(now)
    assert found.patience_seconds() == pytest.approx(1.8)


def test_a_heartbeat_holds_until_the_next_one_that_was_agreed_on() -> None:
    found = members()
    assert found.beat(0, 1.0) == found.beat(1, 1.0) == 0.75
    for number in range(30):
        found.round_ended(1.0 + number * 0.001)
    assert found.patience_seconds() == 1.0
    found.beat(2, 1.2)
    assert found.tick(2.1) == NOTHING
    # Worker 2 knows that rounds are fast now, the others do not.
    assert found.tick(2.3) == Changes((2,), (), ())
    assert found.beat(0, 2.3) == 0.25
    found.hear(1, 2.3)
    assert found.tick(2.7) == found.tick(3.2) == NOTHING
    assert found.tick(3.4) == Changes((0,), (), ())


def test_nobody_is_silent_while_the_service_itself_was_asleep() -> None:
    found = members()
    for tenth in range(2, 21, 2):
        assert found.tick(tenth / 10) == NOTHING
    found.hear(0, 1.9)
    # It was stopped for a minute, and looks at the clock before it reads what has come meanwhile.
    assert found.tick(62.0) == NOTHING
    found.hear(1, 62.1)
    for tenth in range(6210, 6300, 5):
        assert found.tick(tenth / 100) == NOTHING
    # Worker 2 was silent for 2 s before, and is so for another.
    assert found.tick(63.1) == Changes((2,), (), ())
    # Who is silent remains so.
    assert found.tick(64.0) == NOTHING


def test_a_new_life_takes_the_place_of_one_that_is_gone_or_silent() -> None:
    found = members()
    with pytest.raises(NotAdmitted, match="is connected") as error:
        found.admit(1, 201, "host:1", 1.0)
    assert not error.value.is_final
    found.lose(1, 1.0, for_good=False)
    assert not found.admit(1, 201, "host:1", 2.0)
    assert found.is_life(1, 201) and not found.is_life(1, 101)
    found.hear(0, 6.0)
    found.tick(6.0)
    assert not found.admit(2, 202, "host:2", 6.0)
    for worker, old in ((1, 101), (2, 102)):
        with pytest.raises(NotAdmitted, match="followed by another") as error:
            found.admit(worker, old, "", 7.0)
        assert error.value.is_final


def test_the_same_life_may_connect_again_at_any_time() -> None:
    found = members()
    assert found.admit(1, 101, "host:1", 1.0)
    found.lose(1, 2.0, for_good=False)
    assert found.away == {1}
    assert found.admit(1, 101, "host:1", 3.0)
    assert found.away == set()


def test_a_worker_that_stays_away_is_given_up_once() -> None:
    found = members(detection_seconds=1000.0)
    found.lose(1, 1.0, for_good=False)
    found.lose(2, 1.0, for_good=True)
    assert found.tick(1.0 + AWAY_SECONDS) == NOTHING
    assert found.tick(1.1 + AWAY_SECONDS) == Changes((), (), (1,))
    assert found.tick(100.0) == NOTHING


def test_a_worker_is_described_by_its_address_and_when_it_was_seen() -> None:
    found = Members(2, 3.0)
    found.admit(0, 1, "10.0.0.7:5001", 10.0)
    assert found.describe(0, 39.4) == "worker 0 (10.0.0.7:5001, last seen 29 s ago)"
    assert found.describe(1, 39.4) == "worker 1 (never seen)"
