"""Sessions whose slices leave by urgency and within a credit, with a real service."""

import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.errors import ServiceError
from tf_syncdist.propagation.queue import Urgency
from tf_syncdist.propagation.slices import Plan, TensorSpec, plan_by_priority
from tf_syncdist.transport.connection import SliceMessage
from tf_syncdist.transport.limiter import Limiter
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
SPECS = [
    TensorSpec("float32", (700, 3)),
    TensorSpec("int64", (5,)),
    TensorSpec("float32", (90,)),
    TensorSpec("float16", (33,)),
]
# A first layer and a last one, both of many slices.
FIRST, LAST = TensorSpec("float32", (4_000,)), TensorSpec("float32", (40_000,))
SLICE_BYTES = 4_000


def values(worker: int, run: int, specs: list[TensorSpec] = SPECS) -> list[np.ndarray]:
    """A worker's values; all sums of them are exact."""
    rng = np.random.default_rng((worker, run))
    return [rng.integers(-100, 100, s.shape).astype(s.dtype) for s in specs]


def total(workers: int, run: int) -> list[np.ndarray]:
    """The sum of what the first workers contribute."""
    every = [values(w, run) for w in range(workers)]
    return [sum(tensors[1:], tensors[0]) for tensors in zip(*every, strict=True)]


def way_of(session: Session) -> Plan:
    """Cuts `SPECS` into some 20 slices; the variables are not in the order of their use."""
    return plan_by_priority(SPECS, [1, 3, 0, 2], 110, len(session.config.addresses))


def do_run(session: Session, run: int, pause: float = 0.0) -> list[np.ndarray]:
    """Takes a worker through a run as the controller does; the buckets come one by one."""
    way, mine = way_of(session), values(session.config.worker, run)
    late = False
    for bucket in way.buckets:
        if pause:
            time.sleep(random.Random(f"{run} {bucket.tensors}").uniform(0, pause))
        if session.exchanges_of(run) is not None:
            if not late:
                session.send_late(run)
            late = True
        else:
            session.send(run, 0, way, {t: mine[t] for t in bucket.tensors}, [bucket])
    arrays = [np.full(s.shape, -7, s.dtype) for s in SPECS]
    used, count = session.receive(run, 0, way, arrays)
    session.finish(run, 1, Fate.LATE if late or used < count else Fate.CONTRIBUTED)
    return arrays


def same(arrays: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Whether tensors are equal, bit for bit."""
    return [a.tobytes() for a in arrays] == [b.tobytes() for b in others]


def order_of_results(session: Session, way: Plan, run: int = 0) -> list[tuple[int, int]]:
    """Waits for all results of a run; returns shard and number of each, as they have come."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with session._changed:
            found = list(session._results.get((run, 0), ()))
        if len(found) == len(way.slices):
            return found
        time.sleep(0.005)
    raise AssertionError(f"{len(found)} of {len(way.slices)} results have come")


@pytest.mark.parametrize("credit_bytes", [1, 1000, 2**19])
@pytest.mark.parametrize(
    "num_workers, shards, transport",
    [(2, 1, "grpc"), (3, 2, "grpc"), (2, 2, "shared_memory"), (3, 1, "auto")],
)
def test_sums_are_those_of_all_workers(
    serve: Serve, num_workers: int, shards: int, transport: str, credit_bytes: int
) -> None:
    service = serve(num_workers, shards=shards, transport=transport, credit_bytes=credit_bytes)
    sessions = service.sessions()
    results = service.together(*(lambda s=s: [do_run(s, r) for r in range(12)] for s in sessions))
    for run in range(12):
        expected = total(num_workers, run)
        assert all(same(r[run], expected) for r in results)
    for session in sessions:
        assert session.counts[Fate.CONTRIBUTED] == 12
    # What one side has not acknowledged yet is less than the other side waits for.
    for session in sessions:
        for connection in session._connections:
            assert len(connection._slices) == 0
            assert connection._slices.on_its_way < max(1, credit_bytes // 4) + SPECS[0].elements * 4


@pytest.mark.parametrize("credit_bytes, passes", [(1, True), (3 * SLICE_BYTES, True), (0, False)])
def test_an_urgent_slice_that_comes_late_overtakes_those_that_wait(
    serve: Serve, credit_bytes: int, passes: bool
) -> None:
    """Backpropagation yields the last layer first, and the network cannot keep up."""
    # 4 ms for a slice.
    service = serve(1, credit_bytes=credit_bytes, transport="grpc", limit_gbps=0.008)
    (session,) = service.sessions()
    way = plan_by_priority([FIRST, LAST], [0, 1], SLICE_BYTES // 4, 1)
    mine = values(0, 0, [FIRST, LAST])
    last, first = way.buckets
    assert (len(last.slices), len(first.slices)) == (40, 4)
    # The last layer cannot be through, however late this thread is with the first one.
    both, sends = threading.Event(), session._connections[0]._sends
    take, sends.take = sends.take, lambda nbytes: (both.wait(60), take(nbytes))
    session.send(0, 0, way, {1: mine[1]}, [last])
    session.send(0, 0, way, {0: mine[0]}, [first])
    both.set()
    found = order_of_results(session, way)
    at = [found.index((s.shard, s.index)) for s in first.slices]
    if passes:
        # Behind what was on its way already: the credit, and one more.
        assert at == sorted(at)
        assert at[-1] <= credit_bytes // SLICE_BYTES + 1 + 3
    else:
        assert at == [40, 41, 42, 43]
    arrays = [np.zeros(s.shape, s.dtype) for s in (FIRST, LAST)]
    assert session.receive(0, 0, way, arrays) == (44, 44)
    assert same(arrays, mine)


def test_what_was_said_before_a_slice_leaves_before_it(serve: Serve) -> None:
    """A slice of the next run would be refused before the end of this one."""
    (session,) = serve(1, credit_bytes=1000).sessions()
    connection, said = session._connections[0], threading.Event()
    left: list[str] = []

    def leave(name: str) -> None:
        left.append(name)
        if name == "slice":
            said.set()

    def say() -> None:
        connection.send(lambda: leave("end of the run"))
        connection.send_slice(SliceMessage(lambda: leave("slice"), Urgency(1, 0, 0), 4, "slice"))

    class Queue:
        """Something is said just when the sender has seen that nothing is to be sent."""

        def __init__(self) -> None:
            self.queue = connection._outgoing
            self.speaking: threading.Thread | None = None

        def __getattr__(self, name: str) -> object:
            return getattr(self.queue, name)

        def empty(self) -> bool:
            is_empty = self.queue.empty()
            if is_empty and self.speaking is None:
                self.speaking = threading.Thread(target=say)
                self.speaking.start()
                self.speaking.join(0.5)
            return is_empty

    connection._outgoing = Queue()
    connection.acknowledge(0)
    assert said.wait(30)
    assert left == ["end of the run", "slice"]


@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_results_leave_the_service_by_urgency_for_a_slow_reader(
    serve: Serve, transport: str
) -> None:
    """One worker only reads, slowly; the first layer's results are there last."""
    service = serve(2, b=1, credit_bytes=2 * SLICE_BYTES, transport=transport)
    fast, slow = service.sessions()
    way = plan_by_priority([FIRST, LAST], [0, 1], SLICE_BYTES // 4, 1)
    mine = values(0, 0, [FIRST, LAST])
    # What it acknowledges is held up with what it reads.
    holds = threading.Event()
    take, slow._connections[0]._receives.take = slow._connections[0]._receives.take, None
    slow._connections[0]._receives.take = lambda nbytes: (holds.wait(60), take(nbytes))
    for bucket in way.buckets:
        fast.send(0, 0, way, {t: mine[t] for t in bucket.tensors}, [bucket])
    order_of_results(fast, way)
    holds.set()
    found = order_of_results(slow, way)
    at = [found.index((s.shard, s.index)) for s in way.buckets[1].slices]
    # Two were within the credit before the first layer's were there, and one more may have been.
    assert at == list(range(at[0], at[0] + 4)) and at[0] <= 3


@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_what_waits_for_a_round_that_is_over_is_not_sent(serve: Serve, transport: str) -> None:
    """Nor does it keep its credit: the worker goes on, and is in time again."""
    service = serve(2, b=1, credit_bytes=100, transport=transport)
    fast, slow = service.sessions()
    connection = slow._connections[0]
    thin, wide = Limiter(0.00008), connection._sends  # 10 kB/s
    over, take = threading.Event(), thin.take
    thin.take = lambda nbytes: (over.wait(60), take(nbytes))
    connection._sends = thin

    def overtake() -> None:
        service.until(lambda: len(connection._slices) > 10)
        do_run(fast, 0)
        over.set()

    service.together(lambda: do_run(slow, 0), overtake)
    assert slow.counts[Fate.LATE] == 1
    service.until(lambda: len(connection._slices) == 0)
    connection._sends = wide
    for run in range(1, 6):
        # The fast one comes second now.
        done = threading.Event()
        results = service.together(
            lambda r=run, d=done: (do_run(slow, r), d.set())[0],
            lambda r=run, d=done: (d.wait(30), do_run(fast, r))[1],
        )
        assert same(*results)
    assert slow.counts[Fate.CONTRIBUTED] == 5


@pytest.mark.parametrize("num_workers, b, shards", [(3, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize("credit_bytes", [1, 2000])
def test_late_workers_never_say_what_the_service_refuses(
    serve: Serve, num_workers: int, b: int, shards: int, credit_bytes: int
) -> None:
    """A run's end does not overtake its slices, whatever is late and by how much."""
    service = serve(num_workers, b=b, shards=shards, credit_bytes=credit_bytes)
    sessions = service.sessions()

    def work(session: Session) -> list[list[np.ndarray]]:
        pause = 0.003 * session.config.worker
        return [do_run(session, run, pause) for run in range(25)]

    results = service.together(*(lambda s=s: work(s) for s in sessions))
    for run in range(25):
        assert all(same(r[run], results[0][run]) for r in results)
    assert not any(session.has_failed for session in sessions)
    assert not dict(sessions[0].report().refused)


@pytest.mark.parametrize("credit_bytes", [1, 2000])
@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_workers_end_alike_though_streams_break_in_the_middle_of_runs(
    serve: Serve, transport: str, credit_bytes: int
) -> None:
    """What was under way, and the credit for it, is lost; nobody waits for it."""
    service = serve(2, shards=2, transport=transport, credit_bytes=credit_bytes)
    sessions, runs = service.sessions(), 40
    stop, broke = threading.Event(), threading.Event()

    def work(session: Session) -> list[list[np.ndarray]]:
        try:
            results = []
            for run in range(runs):
                # Some are to be cut off before the end, however late that begins.
                assert run < runs // 2 or broke.wait(30)
                results.append(do_run(session, run, 0.002))
            return results
        finally:
            stop.set()

    def cut() -> None:
        rng, count = random.Random(credit_bytes), 0
        while not stop.wait(rng.uniform(0.05, 0.3)) and count < 8:
            session = rng.choice(sessions)
            broken = rng.choice(session._connections)
            broken.abandon()
            broke.set()
            count += 1
            service.until(lambda s=session, b=broken: b not in s._connections and all(s._ready))

    *results, _ = service.together(*(lambda s=s: work(s) for s in sessions), cut)
    assert all(same(*both) for both in zip(*results, strict=True))
    # Who is away for a moment is not waited for; who is there again is.
    service.until(lambda: all(all(s._ready) for s in sessions))
    more = service.together(
        *(lambda s=s: [do_run(s, run, 0.002) for run in range(runs, runs + 5)] for s in sessions)
    )
    assert all(same(*both) for both in zip(*more, strict=True))
    assert same(more[0][-1], total(2, runs + 4))


@pytest.mark.parametrize(
    "name, value", [("propagation", '{"class_name": "x"}'), ("credit_bytes", 7), ("runs_ahead", 0)]
)
def test_workers_must_propagate_alike(serve: Serve, name: str, value: object) -> None:
    service = serve(2, propagation="{}", credit_bytes=1000, runs_ahead=1)
    service.session(0)
    with pytest.raises(ServiceError, match=f"INVALID_ARGUMENT.*same `{name}`") as error:
        service.session(1, **{name: value})
    for both in (value, getattr(service.config, name)):
        assert repr(both) in str(error.value)
    assert service.session(1).job_seed
