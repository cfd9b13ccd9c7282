"""The service's inbox: the most urgent contribution is added first, whoever reads it."""

import threading
from collections.abc import Callable

import pytest

from tf_syncdist.aggregation.inbox import Inbox
from tf_syncdist.propagation.queue import Urgency

_DEADLINE_SECONDS = 30.0


def urgency(priority: int, run: int = 0) -> Urgency:
    return Urgency(run, 0, priority)


def in_thread(do: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


class Blocked:
    """An inbox of which a thread is busy, so that others can pile up what they have read."""

    def __init__(self, threads: int = 1) -> None:
        self.inbox = Inbox()
        self.done: list[object] = []
        self._release = threading.Event()
        begun = threading.Semaphore(0)

        def block() -> None:
            begun.release()
            assert self._release.wait(_DEADLINE_SECONDS)

        self._threads = [
            in_thread(lambda n=n: self.inbox.put_and_do(f"blocker {n}", urgency(0), block))
            for n in range(threads)
        ]
        for _ in range(threads):
            assert begun.acquire(timeout=_DEADLINE_SECONDS)

    def note(self, what: object) -> Callable[[], None]:
        return lambda: self.done.append(what)

    def release(self) -> None:
        self._release.set()
        for thread in self._threads:
            thread.join(_DEADLINE_SECONDS)
            assert not thread.is_alive()


def test_one_thread_does_what_it_puts() -> None:
    inbox, done = Inbox(), []
    for number in (3, 1, 2):
        inbox.put_and_do("a", urgency(number), lambda n=number: done.append(n))
    assert done == [3, 1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_an_owner_is_waited_for_until_all_of_its_own_is_done(fails: bool) -> None:
    blocked = Blocked()
    waited = threading.Event()

    def wait() -> None:
        blocked.inbox.wait_for("blocker 0")
        waited.set()

    waiter = in_thread(wait)
    blocked.inbox.wait_for("nobody")

    def fail() -> None:
        raise RuntimeError("of the test")

    if fails:
        with pytest.raises(RuntimeError, match="of the test"):
            blocked.inbox.put_and_do("another", urgency(1), fail)
        blocked.inbox.wait_for("another")
    assert not waited.is_set()
    blocked.release()
    waiter.join(_DEADLINE_SECONDS)
    assert waited.is_set()


def test_many_threads_do_everything_once() -> None:
    inbox, done, lock = Inbox(), [], threading.Lock()

    def note(what: tuple[int, int]) -> None:
        with lock:
            done.append(what)

    def put(owner: int) -> None:
        for number in range(200):
            inbox.put_and_do(
                owner, urgency(number % 7, run=number // 50), lambda n=number: note((owner, n))
            )
        inbox.wait_for(owner)

    threads = [in_thread(lambda o=owner: put(o)) for owner in range(4)]
    for thread in threads:
        thread.join(_DEADLINE_SECONDS)
        assert not thread.is_alive()
    assert sorted(done) == [(o, n) for o in range(4) for n in range(200)]
    assert not inbox._left and not inbox._items
