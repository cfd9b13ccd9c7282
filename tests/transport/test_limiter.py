"""A slow link on a fast machine."""

import pytest

from tf_syncdist.transport.limiter import Limiter


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.mark.parametrize("gbps", [0.1, 1.0, 40.0])
@pytest.mark.parametrize("size", [1, 200_000, 10_000_000])
def test_bytes_take_as_long_as_on_such_a_link(gbps: float, size: int) -> None:
    clock = Clock()
    limiter = Limiter(gbps, lambda: clock.now, clock.sleep)
    for _ in range(100):
        limiter.take(size)
    expected = 100 * size * 8e-9 / gbps
    assert clock.now - 100.0 == pytest.approx(expected, abs=0.0011)


def test_a_pause_is_not_made_up_for() -> None:
    clock = Clock()
    limiter = Limiter(1.0, lambda: clock.now, clock.sleep)
    limiter.take(1000)
    clock.now += 60.0
    began = clock.now
    limiter.take(125_000_000)
    assert clock.now - began == pytest.approx(1.0, abs=0.0011)


def test_the_rate_can_be_changed_and_taken_away() -> None:
    clock = Clock()
    limiter = Limiter(1.0, lambda: clock.now, clock.sleep)
    limiter.limit(0.0)
    limiter.take(10**12)
    assert clock.now == 100.0
    limiter.limit(8.0)
    limiter.take(10**9)
    assert clock.now == pytest.approx(101.0, abs=0.0011)
