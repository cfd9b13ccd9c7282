"""What leaves for a worker first: what is said, then results by urgency, within a credit."""

import itertools
import random

import pytest

from tf_syncdist.aggregation.outbox import Outbox
from tf_syncdist.propagation.queue import Urgency


def outbox(credit_bytes: int) -> Outbox:
    return Outbox(shares=False, most_bytes=10**6, credit_bytes=credit_bytes)


def drained(box: Outbox) -> list[bytes]:
    """Everything that leaves without another acknowledgement."""
    box.close()
    return list(box.drain(poll_seconds=0.01))


def test_results_leave_by_urgency_and_behind_what_is_said() -> None:
    box = outbox(1000)
    for number, priority in enumerate((7, 3, 5)):
        box.put_result(b"%d" % priority, Urgency(0, 0, priority), 100)
        box.put(b"said %d" % number)
    messages = box.drain(poll_seconds=0.01)
    found = list(itertools.islice(messages, 6))
    assert found == [b"said 0", b"said 1", b"said 2", b"3", b"5", b"7"]


def test_a_result_leaves_although_something_was_said_right_behind_it() -> None:
    """Nothing comes after that would let the stream look at its results again."""
    box = outbox(1000)
    box.put_result(b"result", Urgency(0, 0, 0), 100)
    box.put(b"said")
    messages = box.drain(poll_seconds=0.01)
    assert [next(messages), next(messages)] == [b"said", b"result"]


def test_results_wait_for_credit_and_what_is_said_does_not() -> None:
    box = outbox(100)
    for priority in range(3):
        box.put_result(b"%d" % priority, Urgency(0, 0, priority), 100)
    messages = box.drain(poll_seconds=0.01)
    assert next(messages) == b"0"
    box.put(b"said")
    assert next(messages) == b"said"
    box.acknowledge(100)
    assert next(messages) == b"1"
    # What has become urgent meanwhile is next.
    box.put_result(b"first", Urgency(0, 0, 0), 1)
    box.acknowledge(100)
    assert next(messages) == b"first"


def test_without_credit_results_leave_in_their_order() -> None:
    box = outbox(0)
    for priority in (5, 1):
        box.put_result(b"%d" % priority, Urgency(0, 0, priority), 100)
        box.put(b"said")
    box.acknowledge(100)
    assert drained(box) == [b"5", b"said", b"1", b"said"]


@pytest.mark.parametrize("seed", range(30))
def test_everything_leaves_whatever_comes_when(seed: int) -> None:
    rng, count = random.Random(seed), 60
    box = outbox(rng.choice([1, 150, 10**6]))
    messages, found, expected = box.drain(poll_seconds=0.01), [], []
    on_its_way = 0
    while len(found) < count:
        for _ in range(rng.randint(len(expected) == len(found), 3)):
            number = len(expected)
            if number < count:
                expected.append(b"%d" % number)
                if rng.random() < 0.5:
                    box.put_result(expected[-1], Urgency(0, 0, rng.randint(0, 3)), 100)
                else:
                    box.put(expected[-1])
        # It would wait for ever if it forgot that there is something.
        box.acknowledge(on_its_way)
        found.append(next(messages))
        on_its_way = 100
    assert sorted(found) == sorted(expected)
