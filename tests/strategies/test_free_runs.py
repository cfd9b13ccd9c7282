"""A worker's runs by its own clock, with models that are lists: looks, writes, trainings."""

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from tf_syncdist.observability.mixing_reports import Exchanges
from tf_syncdist.strategies.free_runs import FreeRuns

Key = tuple[int, int]


class Model:
    """One variable: what the program sees of it, and what this worker trains with."""

    def __init__(self, variable: str = "v") -> None:
        self.specs = [(variable, "float32", (1,))]
        self.variable = variable
        self.is_alive = True
        self.common = self.own = 0.0

    def is_like(self, other: "Model") -> bool:
        """See `MixedModel`, as for the others."""
        return self.variable == other.variable

    def has(self, variable: object) -> bool:
        """."""
        return variable == self.variable

    def read_own(self) -> list[np.ndarray]:
        """."""
        return [np.full(1, self.own, "f4")]

    def read_common(self) -> list[np.ndarray]:
        """."""
        return [np.full(1, self.common, "f4")]

    def assign(self, values: Sequence[np.ndarray], own: bool) -> None:
        """."""
        self.common = float(values[0][0])
        if own:
            self.own = self.common


class Others:
    """An exchanger that finds the others in some training, and takes a while to answer."""

    def __init__(self) -> None:
        self.centre = 7.0
        self.key: Key | None = None
        self.asked: list[Key] = []
        self.looks = 0
        self.in_run = False
        self.during = lambda: None
        self._talks = threading.Lock()

    def start(self, variables: list, values: list, key: Key) -> tuple[list[np.ndarray], Key]:
        """See `Exchanger`, as for the others."""
        self.asked.append(key)
        return [np.full(1, self.centre, "f4")], self.key or key

    def exchange(self, step: int, values: list[np.ndarray]) -> list[np.ndarray]:
        """."""
        self._talk()
        return values

    def consensus(self, step: int, values: list[np.ndarray], in_run: bool) -> list[np.ndarray]:
        """."""
        self._talk()
        self.looks += 1
        self.in_run = in_run
        return [np.full(1, self.centre, "f4")]

    def exchanges(self) -> Exchanges:
        """."""
        return Exchanges()

    def _talk(self) -> None:
        assert self._talks.acquire(blocking=False), "two conversations at a time"
        try:
            time.sleep(0.001)
            self.during()
        finally:
            self._talks.release()


class Worker:
    """A worker that has begun no run."""

    def __init__(self) -> None:
        self.fit = 1
        self.others = Others()
        session = SimpleNamespace(
            check=lambda: None,
            has_failed=False,
            config=SimpleNamespace(worker=0, num_workers=2, centre=""),
        )
        self.runs = FreeRuns(session, self.others, 1, lambda: self.fit, lambda text: None)

    def step(self, model: Model) -> None:
        """One run."""
        self.runs.begin(model)
        self.runs.exchange([np.ones(1, "f4")])
        self.runs.finish()


@pytest.fixture
def worker() -> Worker:
    """See `Worker`."""
    return Worker()


def test_the_program_may_look_on_other_threads_while_it_trains(worker: Worker) -> None:
    model, errors, stop = Model(), [], threading.Event()

    def look() -> None:
        try:
            while not stop.is_set():
                worker.runs.refresh()
                worker.runs.settle()
                worker.runs.mixing_report()
        except BaseException as e:  # noqa: BLE001 - the test tells
            errors.append(e)

    worker.step(model)
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline, steps = time.monotonic() + 100, 0
    while steps < 100 or worker.others.looks <= 10:
        worker.step(model)
        steps += 1
        # Threads do not queue for a lock.
        time.sleep(0.0005)
        assert time.monotonic() < deadline
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_a_look_does_not_undo_what_is_written_meanwhile(worker: Worker) -> None:
    model = Model()
    worker.step(model)

    def write() -> None:
        model.common = 3.0
        worker.runs.written()

    worker.others.during = write
    worker.runs.refresh()
    assert model.common == 3.0
    worker.others.during = lambda: None
    worker.step(model)
    assert worker.others.asked == [(1, 0), (1, 1)]


def test_who_looks_during_a_run_says_so(worker: Worker) -> None:
    model = Model()
    worker.runs.begin(model)
    worker.runs.refresh()
    assert worker.others.in_run
    worker.runs.finish()
    # What the run has come to was not seen yet.
    worker.runs.settle()
    assert not worker.others.in_run and worker.others.looks == 2
    worker.runs.settle()
    assert worker.others.looks == 2


def test_only_what_is_trained_now_is_asked_about(worker: Worker) -> None:
    one, other = Model("one"), Model("other")
    assert not worker.runs.trains("one")
    worker.step(one)
    assert worker.runs.trains("one")
    worker.fit = 2
    worker.step(other)
    assert worker.runs.trains("other") and not worker.runs.trains("one")


def test_who_has_joined_others_writes_what_they_have_written_before(worker: Worker) -> None:
    """In the first fit it joins those that are in the third, and comes to it after them."""
    model = Model()
    worker.others.key = (3, 0)
    worker.step(model)
    worker.others.key = None
    for fit in (2, 3):
        worker.runs.written()
        worker.fit = fit
        worker.step(model)
    # From here on it is where they are.
    worker.runs.written()
    worker.step(model)
    worker.fit = 4
    worker.runs.written()
    worker.step(model)
    assert worker.others.asked == [(1, 0), (3, 0), (3, 0), (3, 1), (4, 0)]


def test_another_model_is_trained_where_the_program_is(worker: Worker) -> None:
    worker.others.key = (3, 0)
    worker.step(Model("one"))
    worker.others.key = None
    worker.fit = 2
    worker.step(Model("other"))
    worker.fit = 3
    worker.step(Model("one"))
    with pytest.raises(ValueError, match="to and fro"):
        worker.step(Model("other"))
    assert worker.others.asked == [(1, 0), (2, 0), (3, 0)]
