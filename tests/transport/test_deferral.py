"""Updates that wait for the next run, as controllers make them, with a real service."""

import functools
import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tf_syncdist.aggregation import attendance, recovery
from tf_syncdist.propagation.policies import PriorityPropagation, cutter
from tf_syncdist.propagation.slices import Plan, TensorSpec
from tf_syncdist.strategies.controller import Mode, RunController
from tf_syncdist.transport import states
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]

SHAPES = {"first": (3, 5), "second": (40,), "third": (2, 2, 2)}
SPECS = [TensorSpec("float32", shape) for shape in SHAPES.values()]
# The second one is used first.
PRIORITIES = (1, 0, 2)
CREDIT = {"credit_bytes": 100, "runs_ahead": 1}


class Program:
    """Trains by gradient descent with a decay; implements the site and the store as well.

    A gradient depends on the variables, so that one that was computed with old ones is another.

    Args:
        session: The worker's session.
        defers: Whether updates wait for the next run.
    """

    def __init__(self, session: Session, defers: bool = True) -> None:
        self.replayable, self.unlike_replay = True, ""
        self.outputs: list[np.ndarray] | None = None
        self.synchronised = False
        self.session = session
        self.defers = defers
        self.modes: list[Mode] = []
        self.notices: list[str] = []
        worker = session.config.worker
        shapes = {**SHAPES, "runs": ()}
        self.values = {n: np.full(s, worker, "f4") for n, s in shapes.items()}
        self._is_common = False
        cut = cutter(
            PriorityPropagation(7), None, len(session.config.addresses), session.config.num_workers
        )
        self.controller = RunController(
            session, self, cut, lambda: None, self.notices.append, overlaps=True
        )

    # Runs.

    def do_run(self, compute: Callable[[], object] = lambda: None) -> None:
        """Does one run, as the graph would."""
        controller, way = self.controller, self.controller.plan(SPECS, PRIORITIES)
        mode = controller.begin(self)
        self.modes.append(mode)
        if mode in (Mode.COMPUTE, Mode.CONTINUE):
            if mode is Mode.CONTINUE:
                (rate,) = controller.pending_settings()
                for number in reversed(range(len(way.buckets))):
                    self._update(way.buckets[number].tensors, controller.pending_part(number), rate)
                controller.finish_pending()
            compute()
            rate = np.float32(1 / (2 + controller.run % 5))
            gradients = self._gradients(controller.run)
            # As weight decay does, and counters: not part of the update that waits.
            self._run_effects()
            self._give(way, gradients, rate)
            controller.finish(self, [rate])
        elif mode is Mode.REPLAY:
            rate = np.float32(1 / (2 + controller.run % 5))
            self._run_effects()
            self._update(range(len(SPECS)), controller.stored(way), rate)
            controller.finish(self, None)
        else:
            controller.finish(self, None)

    def do_runs(self, count: int, act: Callable[[], object] = lambda: None) -> None:
        """Does some runs, with something after each of them."""
        for _ in range(count):
            self.do_run()
            act()

    def answer(self, stop: threading.Event) -> None:
        """Does what a program does that is done and waits for the others."""
        while not stop.wait(0.01) and not self.session.has_failed:
            self.controller.answer_state_requests()

    @property
    def waits(self) -> bool:
        """Whether an update waits for the next run."""
        return self.controller._deferral.pending is not None

    @property
    def bytes(self) -> bytes:
        """The variables, with all updates."""
        self.controller.settle()
        return b"".join(v.tobytes() for v in self.values.values())

    def _give(self, way: Plan, gradients: list[np.ndarray], rate: np.ndarray) -> None:
        last = len(way.buckets) - 1
        for number in range(last):
            parts = [gradients[t] for t in way.buckets[number].tensors]
            self.controller.offer(way, number, parts)
        parts = [gradients[t] for t in way.buckets[last].tensors]
        if self.defers:
            self.controller.offer_last(way, last, [rate], parts)
        else:
            results = self.controller.exchange_last(way, last, parts)
            self._update(range(len(SPECS)), results, rate)

    def _gradients(self, run: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.session.config.worker, run))
        return [
            (rng.normal(size=shape) + 0.1 * self.values[name]).astype("f4")
            for name, shape in SHAPES.items()
        ]

    def _run_effects(self) -> None:
        for name in SHAPES:
            self.values[name] = self.values[name] * np.float32(0.99)
        self.values["runs"] = self.values["runs"] + np.float32(1)

    def _update(
        self, numbers: Sequence[int], results: Sequence[np.ndarray], rate: np.ndarray
    ) -> None:
        for number, result in zip(numbers, results, strict=True):
            name = list(SHAPES)[number]
            self.values[name] = self.values[name] - rate * result

    # As a site.

    def defers_update_of(self, variable: int) -> bool:
        return False

    def apply_pending(self, arrays: Sequence[np.ndarray], settings: Sequence[np.ndarray]) -> None:
        self._update(range(len(SPECS)), arrays, settings[0])

    # As a store.

    def unsynchronised(self, site: object) -> list[tuple]:
        return [] if self._is_common else self.specs()

    def commit(self) -> None:
        self._is_common = True

    def specs(self) -> list[tuple]:
        return [(n, "float32", v.shape) for n, v in self.values.items()]

    def read(self) -> list[np.ndarray]:
        return list(self.values.values())

    def assign(self, values: Sequence[np.ndarray]) -> None:
        # Values that are received lie in memory that is used again.
        self.values = {n: np.array(v) for n, v in zip(self.values, values, strict=True)}

    read_new, assign_new = read, assign


def programs(service: object, defers: bool = True) -> list[Program]:
    return [Program(session, defers) for session in service.sessions()]


def alike(workers: Sequence[Program]) -> bool:
    """Whether workers end with the same variables, bit for bit."""
    return len({w.bytes for w in workers}) == 1


@functools.cache
def undeferred(serve: Serve, num_workers: int, runs: int) -> bytes:
    """What a quiet job ends with whose updates do not wait."""
    service = serve(num_workers, deterministic=True)
    workers = programs(service, defers=False)
    service.together(*(functools.partial(w.do_runs, runs) for w in workers))
    assert alike(workers)
    return workers[0].bytes


@pytest.mark.parametrize("num_workers, shards, transport", [(2, 2, "grpc"), (3, 1, "auto")])
@pytest.mark.parametrize("restarts", [False, True])
def test_updates_that_wait_are_those_that_do_not(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    shards: int,
    transport: str,
    restarts: bool,
) -> None:
    """Whenever somebody looks, and though the service is started again and again."""
    for module in (attendance, recovery):
        # A worker that has no turn for seconds would be left out of a round.
        monkeypatch.setattr(module, "GRACE_SECONDS", 30.0)
    runs = 60
    expected = undeferred(serve, num_workers, runs)
    service = serve(num_workers, shards=shards, transport=transport, deterministic=True, **CREDIT)
    workers, stop = programs(service), threading.Event()

    def is_restarted() -> bool:
        return any("connected again" in n for n in service.notices[0])

    def work(worker: Program) -> None:
        rng = random.Random(worker.session.config.worker)

        def look() -> None:
            time.sleep(rng.uniform(0, 0.02))
            if restarts and worker.controller.run == runs - 10:
                service.until(is_restarted)
            assert worker.waits
            if rng.random() < 0.3:
                worker.controller.settle()
                assert not worker.waits

        worker.do_runs(runs, look)

    thread = threading.Thread(target=service.keep_restarting, args=(stop, 1, 4 * restarts))
    thread.start()
    try:
        service.together(*(functools.partial(work, w) for w in workers))
        assert alike(workers)
    finally:
        stop.set()
        thread.join(10)
    assert workers[0].bytes == expected
    for worker in workers:
        assert worker.values["runs"] == runs
        assert set(worker.modes) == {Mode.COMPUTE, Mode.CONTINUE}
        assert worker.controller.report().contributed == runs
    assert is_restarted() == restarts


@pytest.mark.parametrize("history", [{}, {"history_rounds": 1, "history_bytes": 0}])
@pytest.mark.parametrize("seed", range(3))
def test_stragglers_replay_or_take_over_a_state_and_all_end_alike(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, seed: int, history: dict[str, int]
) -> None:
    """Late in computing, or between runs with an update that waits, some rounds or many."""
    monkeypatch.setattr(states, "_STATE_PAUSE_SECONDS", 1.0)
    runs = 50
    service = serve(3, b=1, **CREDIT, **history)
    workers, stop = programs(service), threading.Event()
    left = [len(workers)]

    def work(worker: Program) -> None:
        rng = random.Random(f"{seed} {worker.session.config.worker}")

        def pause() -> None:
            if rng.random() < 0.1:
                time.sleep(rng.choice([0.01, 0.05, 0.2]))

        for _ in range(runs):
            worker.do_run(pause)
            pause()
            if rng.random() < 0.2:
                worker.controller.settle()
        worker.controller.settle()
        left[0] -= 1
        if not left[0]:
            stop.set()
        worker.answer(stop)

    service.together(*(functools.partial(work, w) for w in workers))
    assert alike(workers)
    assert all(w.values["runs"] == runs for w in workers)
    assert any(Mode.REPLAY in w.modes for w in workers)
    for worker in workers:
        report = worker.controller.report()
        assert report.rounds == runs == report.contributed + report.late + report.replayed


def test_a_state_that_is_given_has_the_update_that_waits(serve: Serve) -> None:
    service = serve(2, b=1, **CREDIT)
    giver, receiver = programs(service)
    service.together(giver.do_run, receiver.do_run)
    giver.do_runs(3)
    assert giver.waits
    stop = threading.Event()

    def receive() -> object:
        try:
            receiver.session.request_state(1)
            return receiver.session.receive_state(receiver.specs())
        finally:
            stop.set()

    state, _ = service.together(receive, functools.partial(giver.answer, stop))
    assert state.run == 4 and not giver.waits
    assert b"".join(v.tobytes() for v in state.values) == giver.bytes


def do_five_runs(service: object, workers: Sequence[Program]) -> None:
    """Lets workers do that, of which one is not needed; the last one's update waits then."""
    service.together(*(functools.partial(w.do_runs, 4) for w in workers))
    first, second, last = workers
    # Neither of them can find that the run is over.
    service.together(first.do_run, last.do_run)
    second.do_run()
    assert last.waits


def lose(worker: Program, run: int) -> None:
    """As if a service that was started again could not say what has become of a run."""
    with worker.session._changed:
        worker.session._gone.add(run)
        worker.session._results.clear()


def test_who_cannot_have_the_result_between_runs_takes_over_a_state(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It may need another one, if the others have gone far ahead meanwhile.
    monkeypatch.setattr(states, "_STATE_PAUSE_SECONDS", 1.0)
    service = serve(3, b=1, **CREDIT)
    workers, stop = programs(service), threading.Event()
    do_five_runs(service, workers)
    first, second, loser = workers

    def go_on() -> None:
        lose(loser, 4)
        loser.controller.settle()
        assert not loser.waits and loser.values["runs"] >= 5
        loser.do_runs(20)
        loser.controller.settle()
        stop.set()

    def lead(worker: Program) -> None:
        worker.do_runs(20, lambda: time.sleep(0.01))
        worker.controller.settle()
        worker.answer(stop)

    service.together(go_on, functools.partial(lead, first), functools.partial(lead, second))
    assert alike(workers)
    assert [float(w.values["runs"]) for w in workers] == [25.0] * 3


@pytest.mark.parametrize("others_are_ahead", [True, False])
def test_who_finds_within_a_run_that_the_last_result_is_gone_takes_over_a_later_state(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, others_are_ahead: bool
) -> None:
    """What the run does besides the update must not be done to that state once more."""
    monkeypatch.setattr(states, "_STATE_PAUSE_SECONDS", 0.1)
    service = serve(3, b=1, **CREDIT)
    workers, stop = programs(service), threading.Event()
    do_five_runs(service, workers)
    first, second, loser = workers
    lost, ahead = threading.Event(), threading.Event()
    settings = loser.controller.pending_settings

    def late_settings() -> list[np.ndarray]:
        lose(loser, 4)
        lost.set()
        assert not others_are_ahead or ahead.wait(10)
        return settings()

    def lead(worker: Program) -> None:
        assert lost.wait(10)
        if others_are_ahead:
            worker.do_runs(6)
            ahead.set()
        else:
            worker.controller.settle()
            for _ in range(20):
                worker.controller.answer_state_requests()
                time.sleep(0.01)
        worker.do_runs(20 - 6 * others_are_ahead, lambda: time.sleep(0.01))
        worker.controller.settle()
        worker.answer(stop)

    def follow() -> None:
        loser.controller.pending_settings = late_settings
        loser.do_run()
        del loser.controller.pending_settings
        loser.do_runs(19)
        loser.controller.settle()
        stop.set()

    service.together(functools.partial(lead, first), functools.partial(lead, second), follow)
    assert alike(workers)
    assert [float(w.values["runs"]) for w in workers] == [25.0] * 3
    report = loser.controller.report()
    assert report.rounds == 25 and report.missed >= 2
