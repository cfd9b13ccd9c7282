"""What waits to be sent: the most urgent leaves first, within a credit, and nothing stays."""

from collections import deque
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_syncdist.propagation.queue import Acknowledging, CreditQueue, Urgency

URGENCIES = st.builds(Urgency, st.integers(0, 2), st.integers(0, 1), st.integers(0, 3))
ITEMS = st.lists(st.tuples(URGENCIES, st.integers(0, 300)), max_size=40)
CREDITS = st.integers(1, 600)


class Item(NamedTuple):
    """Something that travels, `serial` in the order in which it was put."""

    urgency: Urgency
    nbytes: int
    serial: int


class Wire:
    """A sender and a receiver with the network's queues between them, in simulated steps."""

    def __init__(self, credit_bytes: int) -> None:
        self.queue: CreditQueue[Item] = CreditQueue(credit_bytes)
        self.delivered: list[Item] = []
        self.waiting: list[Item] = []
        self._credit = credit_bytes
        self._receiver = Acknowledging(credit_bytes)
        self._forth: deque[Item] = deque()
        self._back: deque[int] = deque()
        self._put = 0

    def put(self, urgency: Urgency, nbytes: int) -> Item:
        """Queues something."""
        item = Item(urgency, nbytes, self._put)
        self._put += 1
        self.waiting.append(item)
        self.queue.put(urgency, nbytes, item)
        return item

    def send(self) -> bool:
        """Hands the most urgent item to the network, if that is allowed."""
        if not self.queue.is_ready:
            return False
        before = self.queue.on_its_way
        assert before < self._credit
        item, nbytes = self.queue.take()
        assert nbytes == item.nbytes and self.queue.on_its_way == before + nbytes
        # Equal ones leave as they came.
        assert item == min(self.waiting, key=lambda i: (i.urgency, i.serial))
        self.waiting.remove(item)
        assert len(self.queue) == len(self.waiting)
        self._forth.append(item)
        return True

    def deliver(self) -> bool:
        """Lets the network's first item arrive."""
        if not self._forth:
            return False
        item = self._forth.popleft()
        self.delivered.append(item)
        arrived = self._receiver.arrived(item.nbytes)
        if arrived:
            self._back.append(arrived)
        return True

    def acknowledge(self) -> bool:
        """Lets the first acknowledgement arrive."""
        if not self._back:
            return False
        self.queue.acknowledge(self._back.popleft())
        return True

    def run(self) -> None:
        """Lets everything happen until nothing does."""
        while self.send() or self.deliver() or self.acknowledge():
            pass


@settings(max_examples=300, deadline=None)
@given(CREDITS, ITEMS, st.lists(st.integers(0, 3), max_size=200))
def test_whatever_the_credit_the_most_urgent_leaves_first_and_all_arrive(
    credit: int, items: list[tuple[Urgency, int]], schedule: list[int]
) -> None:
    wire, left = Wire(credit), deque(items)
    largest = max((nbytes for _, nbytes in items), default=0)
    for step in schedule:
        if step == 0 and left:
            wire.put(*left.popleft())
        else:
            (wire.send, wire.deliver, wire.acknowledge)[step - 1]()
        assert wire.queue.on_its_way < credit + max(largest, 1)
    for item in left:
        wire.put(*item)
    wire.run()
    assert len(wire.delivered) == len(items) and not wire.waiting
    assert not wire.queue.is_ready


@settings(max_examples=200, deadline=None)
@given(CREDITS, st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(0, 30))
def test_an_urgent_item_waits_for_the_credit_and_one_item(
    credit: int, sizes: list[int], progress: int
) -> None:
    wire = Wire(credit)
    for nbytes in sizes:
        wire.put(Urgency(0, 0, 5), nbytes)
    for _ in range(progress):
        if not wire.send():
            break
    urgent = wire.put(Urgency(0, 0, 1), 10)
    before = len(wire.delivered)
    wire.run()
    ahead = wire.delivered[before : wire.delivered.index(urgent)]
    assert sum(i.nbytes for i in ahead[:-1]) < credit


def test_older_runs_and_earlier_exchanges_are_more_urgent() -> None:
    queue: CreditQueue[Urgency] = CreditQueue(100)
    order = [Urgency(0, 0, 9), Urgency(0, 1, 0), Urgency(0, 1, 3), Urgency(1, 0, 0)]
    for urgency in reversed(order):
        queue.put(urgency, 1, urgency)
    assert [queue.take()[0] for _ in order] == order


def test_a_credit_of_one_byte_is_stop_and_wait() -> None:
    wire = Wire(1)
    for _ in range(3):
        wire.put(Urgency(0, 0, 0), 1000)
    for _ in range(3):
        assert wire.send() and not wire.send()
        assert wire.deliver() and not wire.send()
        assert wire.acknowledge()
    assert len(wire.delivered) == 3


def test_what_was_not_sent_after_all_gives_its_credit_back() -> None:
    queue: CreditQueue[str] = CreditQueue(10)
    queue.put(Urgency(0, 0, 0), 50, "dropped")
    queue.put(Urgency(0, 0, 1), 50, "next")
    _, nbytes = queue.take()
    assert not queue.is_ready
    queue.acknowledge(nbytes)
    assert queue.is_ready and queue.take() == ("next", 50)
    # More than was sent, as after a stream that broke, is no more than everything.
    queue.acknowledge(10**6)
    assert queue.on_its_way == 0


@settings(max_examples=200, deadline=None)
@given(CREDITS, st.lists(st.integers(0, 300), max_size=50))
def test_all_but_half_of_the_credit_is_acknowledged(credit: int, sizes: list[int]) -> None:
    receiver, held = Acknowledging(credit), 0
    for nbytes in sizes:
        held += nbytes - receiver.arrived(nbytes)
        # The sender is never left without credit for what has arrived.
        assert 0 <= held < max(1, credit // 2)


@pytest.mark.parametrize("credit, messages", [(1, 8), (200, 8), (800, 2), (10**6, 0)])
def test_not_each_slice_is_acknowledged(credit: int, messages: int) -> None:
    receiver = Acknowledging(credit)
    assert sum(receiver.arrived(100) > 0 for _ in range(8)) == messages
