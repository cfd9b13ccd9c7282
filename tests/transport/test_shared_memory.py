"""Sessions whose values lie in memory that is shared with the service, or partly do."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest

from tf_syncdist.aggregation import memory as service_memory
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.errors import ServiceError
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import link
from tf_syncdist.transport import memory as worker_memory
from tf_syncdist.transport.segments import Segment, SegmentError
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
SPECS = [TensorSpec("float32", (700, 3)), TensorSpec("int64", (5,)), TensorSpec("float32", (90,))]
BUCKET_BYTES = 2000


def values(worker: int, run: int) -> list[np.ndarray]:
    """A worker's values; all sums of them are exact."""
    rng = np.random.default_rng((worker, run))
    return [rng.integers(-(10**5), 10**5, s.shape).astype(s.dtype) for s in SPECS]


def total(workers: tuple[int, ...], run: int) -> list[np.ndarray]:
    """The sum of what workers contribute."""
    every = [values(w, run) for w in workers]
    return [sum(tensors[1:], tensors[0]) for tensors in zip(*every, strict=True)]


def do_run(session: Session, run: int) -> list[np.ndarray]:
    """Takes a worker through a run as the controller does; its values are spoilt at its end."""
    way = plan(SPECS, BUCKET_BYTES, len(session.config.addresses))
    mine = values(session.config.worker, run)
    late = session.exchanges_of(run) is not None
    if late:
        session.send_late(run)
    else:
        for bucket in way.buckets:
            session.send(run, 0, way, {t: mine[t] for t in bucket.tensors}, [bucket])
    arrays = [np.full(s.shape, -7, s.dtype) for s in SPECS]
    used, count = session.receive(run, 0, way, arrays)
    session.finish(run, 1, Fate.LATE if late or used < count else Fate.CONTRIBUTED)
    for array in mine:
        array.fill(-1)
    return arrays


def same(arrays: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Whether tensors are equal, bit for bit."""
    return [a.tobytes() for a in arrays] == [b.tobytes() for b in others]


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts what is read from shared memory, by the service and by workers."""
    counts = {"service": 0, "worker": 0}
    # However slow the machine is, memory is used as soon as there is an answer.
    monkeypatch.setattr(link, "_ANSWER_SECONDS", 30.0)

    def counted(name: str, read: Callable) -> Callable:
        def wrapped(*args: object) -> object:
            counts[name] += 1
            return read(*args)

        return wrapped

    for name, cls in (
        ("service", service_memory.WorkerMemory),
        ("worker", worker_memory.Opened),
    ):
        monkeypatch.setattr(cls, "read", counted(name, cls.read))
    yield counts


@pytest.mark.parametrize("transports", [("auto",) * 3, ("grpc",) * 3, ("grpc", "auto", "auto")])
@pytest.mark.parametrize(("b", "shards"), [(0, 1), (0, 2), (1, 1)])
def test_workers_with_and_without_shared_memory_get_the_same_bytes(
    serve: Serve, in_memory: dict[str, int], transports: tuple[str, ...], b: int, shards: int
) -> None:
    service, runs = serve(3, b=b, shards=shards), 30
    sessions = [service.session(w, transport=t) for w, t in enumerate(transports)]

    def work(session: Session) -> list[list[np.ndarray]]:
        rng = random.Random(session.config.worker)
        results = []
        for run in range(runs):
            time.sleep(rng.choice([0, 0, 0.005]))
            results.append(do_run(session, run))
        return results

    results = service.together(*(lambda s=s: work(s) for s in sessions))
    for run in range(runs):
        assert all(same(r[run], results[0][run]) for r in results)
        if b == 0:
            assert same(results[0][run], total((0, 1, 2), run))
    assert (in_memory["service"] > 0, in_memory["worker"] > 0) == ("auto" in transports,) * 2
    assert not any(service.notices)


def test_memory_is_used_again(serve: Serve) -> None:
    service = serve(2, history_rounds=1, history_bytes=0)
    sessions = service.sessions()

    def work(session: Session) -> None:
        for run in range(60):
            do_run(session, run)

    service.together(*(lambda s=s: work(s) for s in sessions))
    exchange = sum(s.elements * np.dtype(s.dtype).itemsize for s in SPECS)
    # Blocks are whole pages, and hardly more than two rounds are on their way at a time.
    for server in service.servers:
        used = sum(o.size for o in server.job._memory.offers())  # noqa: SLF001
        assert 0 < used <= max(2**20, 8 * (exchange + 4096 * 8))


def test_a_worker_that_is_behind_reads_what_was_sent_to_it_though_it_is_not_kept(
    serve: Serve,
) -> None:
    service = serve(3, b=1, history_rounds=1, history_bytes=0)
    first, second, third = service.sessions()
    # The third one has begun to share memory before it falls behind.
    for run in range(3):
        service.together(*(lambda s=s, r=run: do_run(s, r) for s in (first, second, third)))
    results = []
    for run in range(3, 12):
        both = service.together(*(lambda s=s, r=run: do_run(s, r) for s in (first, second)))
        results.append(both[0])
    # Four rounds ahead of a worker are sent to it; the memory of these is not used again so far.
    for run in range(3, 7):
        assert same(do_run(third, run), results[run - 3])
    service.until(lambda: not third.wait_results(7))


@pytest.mark.parametrize("forced", [False, True])
def test_without_shared_memory_a_run_goes_on_over_grpc_unless_it_was_asked_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, in_memory: dict[str, int], forced: bool
) -> None:
    def cannot(offer: object) -> Segment:
        raise SegmentError("process 1's memory cannot be opened (of the test)")

    monkeypatch.setattr(Segment, "open", cannot)
    service = serve(2, transport="shared_memory" if forced else "auto")
    sessions = service.sessions()

    def work(session: Session) -> list[np.ndarray]:
        for run in range(20):
            result = do_run(session, run)
        return result

    if forced:
        with pytest.raises(ServiceError, match="shared_memory.*of the test"):
            service.together(*(lambda s=s: work(s) for s in sessions))
        return
    for result in service.together(*(lambda s=s: work(s) for s in sessions)):
        assert same(result, total((0, 1), 19))
    assert in_memory == {"service": 0, "worker": 0}
    for worker, notices in enumerate(service.notices):
        (notice,) = notices
        assert f"worker {worker} shares no memory with the service" in notice
        assert "over gRPC" in notice


def test_a_machine_without_memory_goes_on_over_grpc(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(size: int) -> Segment:
        raise SegmentError(f"{size} bytes of shared memory cannot be had (of the test)")

    monkeypatch.setattr(Segment, "create", cannot)
    service = serve(2)
    for run in range(3):
        for result in service.together(
            *(lambda s=s, r=run: do_run(s, r) for s in service_of(service))
        ):
            assert same(result, total((0, 1), run))
    assert any("results travel over gRPC" in e for e in service.events)
    assert all(len(n) == 1 for n in service.notices)


def service_of(service: object) -> list[Session]:
    """The sessions of a service, opened once."""
    return service._sessions or service.sessions()  # noqa: SLF001


def test_a_service_of_another_host_is_not_asked_for_memory(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(1)
    monkeypatch.setattr(service.servers[0].job, "_host", "another machine")
    with pytest.raises(ServiceError, match="same machine.*Leave `transport` out"):
        service.session(0, transport="shared_memory")


def test_a_location_beyond_a_segment_is_refused(serve: Serve) -> None:
    service = serve(1)
    session = service.session(0)
    do_run(session, 0)
    service.until(lambda: do_run_in_memory(session))
    bad = pb.Contribution(run=session_run(session), num_slices=1, dtype=pb.FLOAT32, elements=1000)
    bad.location.segment, bad.location.offset = 0, 2**40
    session._send_first(pb.ToAggregator(contribution=bad))  # noqa: SLF001
    with pytest.raises(ServiceError, match="INVALID_ARGUMENT.*1000 value"):
        session.receive(session_run(session), 0, plan(SPECS, BUCKET_BYTES, 1), values(0, 0))


def session_run(session: Session) -> int:
    """The run that a session is about to begin."""
    return session._finished  # noqa: SLF001


def do_run_in_memory(session: Session) -> bool:
    """Does one more run and returns whether its values were in shared memory."""
    do_run(session, session_run(session))
    return bool(session._lending[0]._answered)  # noqa: SLF001


def test_a_worker_that_scribbles_spoils_its_own_values_only(serve: Serve) -> None:
    """The service reads them once, and what it sends is its own."""
    service = serve(2)
    sessions = service.sessions()
    for run in range(5):
        service.together(*(lambda s=s, r=run: do_run(s, r) for s in sessions))
    lending = sessions[1]._lending[0]  # noqa: SLF001
    for run in range(5, 10):
        for segment in lending._segments.values():  # noqa: SLF001
            segment.data[:] = 255
        results = service.together(*(lambda s=s, r=run: do_run(s, r) for s in sessions))
        assert same(results[0], results[1])


@pytest.mark.parametrize("transports", [("auto",) * 3, ("grpc",) * 3, ("auto", "grpc", "auto")])
def test_deterministic_sums_do_not_depend_on_the_order_of_arrival(
    serve: Serve, transports: tuple[str, ...]
) -> None:
    specs = [TensorSpec("float32", (500,))]
    way = plan(specs, 400, 1)
    rng = np.random.default_rng(0)
    # Sums of these differ with the order.
    mine = [(rng.normal(size=500) * 10.0 ** rng.integers(-6, 6, 500)).astype("f4") for _ in "abc"]
    expected = (mine[0] + mine[1]) + mine[2]
    assert any(
        (mine[a] + mine[b] + mine[3 - a - b]).tobytes() != expected.tobytes()
        for a, b in combinations(range(3), 2)
    )
    service = serve(3, deterministic=True)
    sessions = [service.session(w, transport=t) for w, t in enumerate(transports)]

    def work(session: Session) -> list[bytes]:
        found = []
        for run in range(8):
            time.sleep(0.01 * ((session.config.worker + run) % 3))
            session.send(run, 0, way, [mine[session.config.worker]])
            out = [np.zeros(500, "f4")]
            session.receive(run, 0, way, out)
            session.finish(run, 1, Fate.CONTRIBUTED)
            found.append(out[0].tobytes())
        return found

    for found in service.together(*(lambda s=s: work(s) for s in sessions)):
        assert set(found) == {expected.tobytes()}


def test_deterministic_sums_go_on_without_a_worker_that_leaves(serve: Serve) -> None:
    service = serve(3, deterministic=True, transport="grpc")
    first, second, third = service.sessions()
    way = plan(SPECS, BUCKET_BYTES, 1)
    for session in (second, third):
        session.send(0, 0, way, values(session.config.worker, 0))
    first.goodbye(pb.FAILED, 0)
    arrays = [np.zeros(s.shape, s.dtype) for s in SPECS]
    second.receive(0, 0, way, arrays)
    expected = [
        np.rint(t * 1.5).astype(t.dtype) if t.dtype.kind == "i" else t * np.float32(1.5)
        for t in total((1, 2), 0)
    ]
    assert same(arrays, expected)


def test_a_service_ends_although_values_wait_for_their_turn(serve: Serve) -> None:
    """Its threads would keep the process, also after the program is done."""
    before = set(threading.enumerate())
    service = serve(2, deterministic=True, transport="grpc")
    _, second = service.sessions()
    second.send(0, 0, plan(SPECS, BUCKET_BYTES, 1), values(1, 0))
    job = service.servers[0].job
    service.until(lambda: job.report().workers)
    time.sleep(0.3)
    service.servers[0].close(grace_seconds=0)

    def reads(thread: threading.Thread) -> bool:
        return thread.name == "tf_syncdist_reader" and thread not in before

    service.until(lambda: not any(map(reads, threading.enumerate())))
    # Those that send have come to their end when nothing is left to be sent.
    assert not job._streams  # noqa: SLF001


def test_backup_workers_and_deterministic_sums_exclude_each_other(serve: Serve) -> None:
    with pytest.raises(ServiceError, match="waits for all workers"):
        serve(3, b=1, deterministic=True).session(0)
