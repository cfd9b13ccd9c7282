"""The auto-tuner of learners: experiment f8 of the digest of CROSSBOW."""

from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.mixing.tuning import Tuner, agreed, measured, table


def tuned(throughput: Callable[[int], float], most: int = 100) -> Tuner:
    tuner = Tuner()
    while not tuner.done:
        tuner = measured(tuner, throughput(tuner.learners), most=most)
    return tuner


def test_f8_it_tries_five_and_keeps_four() -> None:
    tuner = tuned(lambda m: 1000 * m / (m + 2))
    assert tuner.learners == 4
    assert [t.learners for t in tuner.trials] == [1, 2, 3, 4, 5]
    gains = [t.gain for t in tuner.trials]
    assert gains[0] is None
    assert gains[1:] == pytest.approx([0.5, 0.2, 1 / 9, 1 / 14])


@pytest.mark.parametrize("half", [0.5, 1.0, 3.0, 8.0])
def test_f8_it_stops_at_the_first_gain_that_is_too_small(half: float) -> None:
    for seed in range(50):
        random, seen = np.random.default_rng(seed), {}

        def throughput(learners: int, random=random, seen=seen) -> float:
            seen[learners] = learners / (learners + half) * (1 + 0.02 * random.normal())
            return seen[learners]

        tuner = tuned(throughput)
        gains = {m: seen[m] / seen[m - 1] - 1 for m in seen if m > 1}
        first = min(m for m, gain in gains.items() if gain <= 0.10)
        assert tuner.learners == first - 1
        assert max(seen) == first


def test_it_never_tries_more_than_there_can_be() -> None:
    tuner = tuned(lambda m: m, most=3)
    assert tuner.learners == 3 and len(tuner.trials) == 3


def test_it_stays_where_it_is_when_it_is_done() -> None:
    tuner = tuned(lambda m: 1.0)
    assert tuner.learners == 1
    assert measured(tuner, 1e9) == tuner


@pytest.mark.parametrize(
    ("tables", "learners", "throughputs"),
    [
        ([[100, 150, 155]], 2, [100, 150, 155]),
        # The slowest worker sets the pace, whichever that is with so many learners.
        ([[100, 150, 155], [80, 160, 170]], 2, [160, 300, 310]),
        ([[100, 101], [50, 70, 100, 101]], 2, [100, 140]),
        ([[100, 101], [99, 150, 200, 201]], 1, [198, 202]),
        ([[100, 150, 155], []], 1, []),
        ([], 1, []),
    ],
)
def test_workers_agree_on_a_number(
    tables: list[list[float]], learners: int, throughputs: list[float]
) -> None:
    tuner = agreed(tables)
    assert tuner.done and tuner.learners == learners
    assert [t.throughput for t in tuner.trials] == throughputs
    assert agreed(tables[::-1]) == tuner


def test_the_table_has_a_line_for_each_trial_and_says_what_is_kept() -> None:
    head, *lines = table(tuned(lambda m: 1000 * m / (m + 2))).splitlines()
    assert head.split() == ["learners", "examples/s", "gain"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert [line.endswith("kept") for line in lines] == [False, False, False, True, False]
    assert "+50 %" in lines[1]
