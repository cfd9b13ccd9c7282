"""What a cutoff policy has chosen, and when its reasons are said."""

import numpy as np

from tf_syncdist.aggregation.choices import Choices, Reasons
from tf_syncdist.cutoff import Plan, RoundTimes


def test_a_reason_is_said_when_it_changes_and_not_when_only_its_numbers_do() -> None:
    reasons = Reasons()
    assert reasons.is_news("the first 3 of 4 are in after 0.25 s", 0.0)
    assert not reasons.is_news("the first 2 of 4 are in after 1.5e-05 s", 1.0)
    assert reasons.is_news("only 2 of 4 workers are left to wait for", 2.0)


def test_reasons_that_take_turns_are_said_once_a_minute() -> None:
    reasons = Reasons()
    said = [now for now in range(130) if reasons.is_news("even" if now % 2 else "odd", float(now))]
    assert said == [0, 1, 60, 61, 120, 121]


def test_who_came_after_the_closing_is_not_counted() -> None:
    choices = Choices()
    seconds = np.array([0.2, 0.5, 0.7, np.nan])
    times = RoundTimes(0, seconds, 0.5, np.ones(4, bool))
    choices.add(times, Plan(2, 0.4, "of the test"))
    choices.add(times, None)
    first, second = choices.recent()
    assert (first.count, first.closed_seconds, first.expected_seconds) == (2, 0.5, 0.4)
    assert np.isnan(second.expected_seconds)
    assert choices.reason == "of the test"
