"""Sessions of workers with a real service, over real sockets."""

import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.errors import (
    AggregatorUnreachableError,
    ServiceError,
    SyncDistError,
    WaitTimeoutError,
)
from tf_syncdist.propagation.slices import Plan, TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import link
from tf_syncdist.transport.connection import Connection
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
SPECS = [TensorSpec("float32", (5, 7)), TensorSpec("int32", ()), TensorSpec("float32", (0, 3))]


def way(shards: int = 1) -> Plan:
    """Cuts `SPECS` into 4 slices."""
    return plan(SPECS, 48, shards)


def values(worker: int, run: int = 0) -> list[np.ndarray]:
    """A worker's values; all sums of them are exact."""
    rng = np.random.default_rng((worker, run))
    return [rng.integers(-1000, 1000, s.shape).astype(s.dtype) for s in SPECS]


def receive(session: Session, run: int = 0, exchange: int = 0) -> tuple[list, tuple | None]:
    """Returns the result of an exchange, and in how many slices the worker is."""
    shards = len(session.config.addresses)
    arrays = [np.full(s.shape, -7, s.dtype) for s in SPECS]
    return arrays, session.receive(run, exchange, way(shards), arrays)


def do_run(session: Session, run: int) -> list[np.ndarray]:
    """Takes a worker through a run as the controller does."""
    late = session.exchanges_of(run) is not None
    if late:
        session.send_late(run)
    else:
        session.send(run, 0, way(len(session.config.addresses)), values(session.config.worker, run))
    arrays, (used, total) = receive(session, run)
    session.finish(run, 1, Fate.LATE if late or used < total else Fate.CONTRIBUTED)
    return arrays


def same(arrays: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Whether tensors are equal, bit for bit."""
    return [a.tobytes() for a in arrays] == [b.tobytes() for b in others]


def total(workers: list[int], run: int = 0) -> list[np.ndarray]:
    """The sum of what workers contribute."""
    return [
        np.sum(t, 0, dtype=s.dtype)
        for t, s in zip(zip(*(values(w, run) for w in workers), strict=True), SPECS, strict=True)
    ]


def counts(job: Job) -> list[tuple[int, ...]]:
    """What a shard has counted for every worker."""
    return [(w.contributed, w.late, w.partly_used, w.replayed) for w in job.report().workers]


@pytest.mark.parametrize("shards", [1, 2])
def test_everybody_gets_the_sum_of_the_first_n_and_the_late_one_too(
    serve: Serve, shards: int
) -> None:
    service = serve(3, b=1, shards=shards)
    fast, also_fast, slow = service.sessions()
    first, second = service.together(lambda: do_run(fast, 0), lambda: do_run(also_fast, 0))
    service.until(lambda: slow.exchanges_of(0) is not None)
    assert slow.exchanges_of(0) == 1
    third = do_run(slow, 0)
    assert same(first, total([0, 1])) and same(second, first) and same(third, first)
    for server in service.servers:
        service.until(lambda job=server.job: sum(map(sum, counts(job))) == 3)
        assert counts(server.job) == [(1, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0)]
        assert server.job.report().rounds == 1


@pytest.mark.parametrize("num_workers, b, shards", [(1, 0, 2), (2, 0, 2), (4, 1, 1), (4, 2, 3)])
def test_many_runs_give_the_same_bytes_to_all(
    serve: Serve, num_workers: int, b: int, shards: int
) -> None:
    service, runs = serve(num_workers, b=b, shards=shards), 25
    sessions = service.sessions()

    def work(session: Session) -> list[list[np.ndarray]]:
        return [do_run(session, run) for run in range(runs)]

    results = service.together(*(lambda s=s: work(s) for s in sessions))
    for run in range(runs):
        assert all(same(r[run], results[0][run]) for r in results)
        if b == 0:
            assert same(results[0][run], total(list(range(num_workers)), run))
    service.until(lambda: all(w.contributed + w.late == runs for w in sessions[0].report().workers))
    report = sessions[0].report()
    assert report.rounds == runs
    assert all(w.partly_used <= w.late for w in report.workers)


def test_tensors_that_are_not_contiguous_can_be_sent(serve: Serve) -> None:
    (session,) = serve(1).sessions()
    mine = values(0)
    session.send(0, 0, way(), [np.asfortranarray(mine[0]), *mine[1:]])
    assert same(receive(session)[0], mine)


def test_an_exchange_of_nothing_has_a_result_at_once(serve: Serve) -> None:
    session, _ = serve(2).sessions()
    nothing, empty = plan(SPECS[2:], 48, 1), [np.zeros((0, 3), "f4")]
    session.send(0, 0, nothing, empty)
    assert session.receive(0, 0, nothing, empty) == (0, 0)


def test_who_disconnects_lets_the_others_go_on(serve: Serve) -> None:
    service = serve(3, shards=2)
    first, second, leaver = service.sessions()
    first.send(0, 0, way(2), values(0))
    second.send(0, 0, way(2), values(1))
    leaver.close()
    arrays, _ = receive(first)
    assert same(arrays, receive(second)[0])
    # The mean over two, times N = 3.
    np.testing.assert_allclose(arrays[0], total([0, 1])[0] * 1.5)
    service.until(lambda: any("worker 2 is gone" in n for n in service.notices[0]))


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_workers", 4),
        ("cutoff", '{"class_name": "FullSync", "config": {}}'),
        ("history_rounds", 9),
        ("history_bytes", 9),
    ],
)
def test_workers_must_believe_in_the_same_job(serve: Serve, name: str, value: object) -> None:
    service = serve(3)
    service.session(0)
    with pytest.raises(ServiceError, match=f"INVALID_ARGUMENT.*same `{name}`") as error:
        service.session(1, **{name: value})
    for both in (value, getattr(service.config, name)):
        assert repr(both) in str(error.value)
    # The refused worker can come again with the right arguments.
    assert service.session(1).job_seed == service.session(2).job_seed


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"worker": 3}, "worker=3, num_workers=3"),
        ({"cutoff": "x"}, "Expected a cutoff policy such as"),
        ({"cutoff": '{"class_name": "BackupWorkers", "config": {"b": 3}}'}, "Use at most 2"),
    ],
)
def test_a_first_worker_that_cannot_be_is_refused(
    serve: Serve, changes: dict[str, object], why: str
) -> None:
    service = serve(3)
    with pytest.raises(ServiceError, match="INVALID_ARGUMENT") as error:
        service.session(**{"worker": 0, **changes})
    assert why in str(error.value)


def test_a_worker_that_is_there_is_refused(serve: Serve, heard_of: set[int]) -> None:
    heard_of |= {0, 1}
    service = serve(2, detection_seconds=0.3)
    first, second = service.sessions()
    with pytest.raises(ServiceError, match="ALREADY_EXISTS.*worker=1, which is connected"):
        service.session(1)
    second.close()
    service.until(lambda: any("worker 1 is gone" in n for n in service.notices[0]))
    first.send(0, 0, way(), values(0))
    assert receive(first)[1] == (4, 4)


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_without_service_is_an_error_in_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    service, connect = serve(1), link.Connection
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"

        def connect_or_hurry(to: str, *args: object) -> Connection:
            *callbacks, seconds, credentials = args[:4]
            # The service that is there may need all of its time on a busy machine.
            seconds /= 60 if to == address else 1
            return connect(to, *callbacks, seconds, credentials, *args[4:])

        monkeypatch.setattr(link, "Connection", connect_or_hurry)
        addresses = (*service.config.addresses, address)
        started = time.monotonic()
        with pytest.raises(AggregatorUnreachableError, match=f"{address} within 0.5 s"):
            service.session(0, addresses=addresses, connect_timeout_seconds=30.0)
    assert 0.4 < time.monotonic() - started < 25
    service.until(lambda: not service.servers[0].job.in_progress)


def test_a_service_that_goes_away_is_an_error_that_names_it(serve: Serve) -> None:
    service = serve(2)
    session, _ = service.sessions()
    service.be_impatient(connect_timeout_seconds=1.0)
    threading.Timer(0.1, service.servers[0].close, (0,)).start()
    with pytest.raises(ServiceError, match=service.config.addresses[0]):
        receive(session)
    assert session.has_failed
    with pytest.raises(ServiceError):
        session.report()


def test_waits_have_a_deadline(serve: Serve) -> None:
    service = serve(2, timeout_seconds=0.2)
    session, _ = service.sessions()
    session.send(0, 0, way(), values(0))
    for wait in (
        lambda: receive(session),
        lambda: session.gather(pb.METRICS, 0, 0, 1, np.ones(1)),
        lambda: session.agree(0, [("kernel", "float32", (2,))]),
        lambda: session.receive_state([]),
    ):
        started = time.monotonic()
        with pytest.raises(WaitTimeoutError, match="Worker 0 waited 0.2 s for"):
            wait()
        assert 0.1 < time.monotonic() - started < 20


def test_cancel_wakes_a_wait_and_ends_later_ones(serve: Serve) -> None:
    session, _ = serve(2).sessions()
    threading.Timer(0.1, session.cancel, (KeyError("mine"),)).start()
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            receive(session)
    assert time.monotonic() - started < 20
    session.cancel(ValueError("too late"))
    with pytest.raises(KeyError):
        session.exchanges_of(0)


def test_sessions_and_servers_can_be_closed_twice(serve: Serve) -> None:
    service = serve(1, shards=2)
    (session,) = service.sessions()
    for _ in range(2):
        session.close()
    with pytest.raises(SyncDistError, match="closed"):
        receive(session)
    service.until(lambda: not any(server.job.in_progress for server in service.servers))
    for _ in range(2):
        service.close()


@pytest.mark.parametrize(
    "ends, over_at",
    [
        ([(1, 3), (2, 5)], (3, 1)),
        ([(1, 5), (2, 3)], (3, 2)),
        ([(1, 0), (2, 4)], (4, 2)),
        ([(1, 0)], None),
    ],
)
def test_the_job_is_over_where_the_shortest_program_ended(
    serve: Serve, ends: list[tuple[int, int]], over_at: tuple[int, int] | None
) -> None:
    """A program without any run says nothing; who ended the job is told along."""
    service = serve(3, b=2)
    sessions = service.sessions()
    for worker, run in ends:
        sessions[worker].goodbye(pb.FINISHED, run)
        service.until(lambda w=worker: any(f"worker {w} left" in e for e in service.events))
    for worker in {0, 1, 2} - dict(ends).keys():
        sessions[worker].goodbye(pb.FAILED, 1)
    # What was said before has arrived when this has.
    assert sessions[0].wait_all_gone(30, lambda: None)
    assert sessions[0].job_over_at() == over_at


@pytest.mark.parametrize("reason", [pb.FAILED, pb.PREEMPTED, pb.LEAVE_UNSPECIFIED])
def test_a_worker_that_leaves_early_does_not_end_the_job(serve: Serve, reason: int) -> None:
    session, leaver = serve(2).sessions()
    leaver.goodbye(reason, 0)
    session.send(0, 0, way(), values(0))
    assert receive(session)[1] == (4, 4)
    assert session.job_over_at() is None
    assert not session.wait_all_gone(0.1, lambda: None)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_exchange_that_a_run_did_not_have_is_an_error_at_once(serve: Serve, shards: int) -> None:
    service = serve(2, b=1, shards=shards)
    first, second = service.sessions()
    do_run(first, 0)
    service.until(lambda: second.exchanges_of(0) is not None)
    assert receive(second)[1] == (0, 4)
    started = time.monotonic()
    with pytest.raises(
        ServiceError, match="same exchanges in a run.* 1 of them in run 0.*worker 1"
    ):
        receive(second, exchange=1)
    assert time.monotonic() - started < 20
