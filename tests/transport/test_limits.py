"""What one worker, or a stranger, may take of the service: floods are refused, others go on."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.limits import Limits
from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.aggregation.streams import TrainStream
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

from .hostile import at_most, hello

Serve = Callable[..., object]
WAY = plan([TensorSpec("float32", (4,))], 100, 1)
FOUR = np.ones(4, "<f4").tobytes()
MEGABYTE = np.ones(2**18, "<f4").tobytes()
MANY = 400_000


def said(payload: bytes = b"", **body: object) -> bytes:
    """A message of a worker."""
    return wire.encode(pb.ToAggregator(**body), payload)


def part(run: int = 0, exchange: int = 0, number: int = 0, **changes: object) -> pb.Contribution:
    """A contribution to one slice."""
    good = {"num_slices": 2**32 - 1, "dtype": pb.FLOAT32, "elements": 4}
    return pb.Contribution(run=run, exchange=exchange, slice=number, **{**good, **changes})


def specs(count: int) -> list[pb.VariableSpec]:
    return [pb.VariableSpec(name=f"v{i}", dtype="float32", shape=[4]) for i in range(count)]


def manifest(run: int, count: int = 1) -> bytes:
    return said(manifest=pb.Manifest(run=run, variables=specs(count)))


def chunk(run: int, **changes: object) -> pb.StateChunk:
    return pb.StateChunk(**{"run": run, "num_variables": 2, "total": 2**50, **changes})


# For each: what is sent one after the other by worker 0 of 2, at most how much of it is taken, and
# what the refusal names.
FLOODS: dict[str, tuple[Callable[[int], bytes], int, str]] = {
    "values": (
        lambda i: said(MEGABYTE, contribution=part(number=i, elements=2**18)),
        15,
        "bytes from a worker in a round",
    ),
    "empty slices": (
        lambda i: said(contribution=part(number=i, elements=0)),
        2**12,
        "bytes from a worker in a round",
    ),
    "exchanges": (
        lambda i: said(FOUR, contribution=part(exchange=i)),
        2**12,
        "bytes from a worker in a round",
    ),
    "claimed tables": (
        lambda i: said(contribution=part(number=i, elements=2**62, row_elements=2**20)),
        2**12,
        "bytes from a worker in a round",
    ),
    "votes": (lambda i: said(end_vote=pb.EndVote(run=i + 1)), 256, "a run up to 256"),
    "far vote": (lambda i: said(end_vote=pb.EndVote(run=2**60)), 0, "run=11529215"),
    "wishes to stop": (lambda i: said(stop_wish=pb.StopWish(fit=i)), 16, "at most 16 trainings"),
    "segment offers": (
        lambda i: said(segment=pb.Segment(id=i, pid=1, fd=1, size=1)),
        1024,
        "at most 1024 messages `segment`",
    ),
    "goodbyes": (
        lambda i: said(goodbye=pb.Goodbye(reason=pb.PREEMPTED)),
        16,
        "at most 16 messages `goodbye`",
    ),
    "gathers": (
        lambda i: said(FOUR, gather=pb.Gather(kind=pb.METRICS, serial=i)),
        4,
        "what comes of 4 gathers",
    ),
    "manifests": (lambda i: manifest(i, 10_000), 4, "at most 4 answers"),
    "variables before the start": (
        lambda i: said(MEGABYTE, state_chunk=chunk(0)) if i else manifest(0),
        17,
        "bytes of variables before all workers are there",
    ),
    "pieces of nothing": (
        lambda i: said(state_chunk=chunk(i)),
        4,
        "at most 4 answers",
    ),
    "runs without exchange": (
        lambda i: said(run_finished=pb.RunFinished(run=i, fate=Fate.CONTRIBUTED)),
        2**10,
        "runs without any",
    ),
    "passes": (lambda i: said(enter_pass=pb.EnterPass(input_pass=i)), MANY, ""),
    "late": (lambda i: said(late=pb.LateContribution()), MANY, ""),
    "votes for one run": (lambda i: said(end_vote=pb.EndVote(run=1)), MANY, ""),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_refused_before_it_fills_the_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tf_syncdist.aggregation.limits._EMPTY_RUNS", 2**10)
    make, most, why = FLOODS[name]
    job = Job(worker_bytes=2**24)
    host = job._host if name == "segment offers" else ""  # noqa: SLF001
    outboxes = [job.join(hello(w, 2, 0, host=host)) for w in range(2)]
    refusal, taken = None, 0
    with at_most(2**26, seconds=100):
        for taken in range(min(most + 10, 5000 if most == MANY else MANY)):  # noqa: B007
            try:
                job.handle(0, make(taken))
            except Refused as e:
                refusal = e
                break
            for outbox in outboxes:
                # Workers read what they are told.
                while outbox._messages.qsize():  # noqa: SLF001
                    outbox._messages.get()  # noqa: SLF001
        job.tick()
    if most == MANY:
        assert refusal is None
        return
    assert refusal is not None and why in refusal.details
    assert refusal.reason and refusal.code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    assert taken <= most
    job.lost(0, "it was refused")
    assert not job.done.is_set(), "worker 1 goes on"


def test_gathers_of_the_only_worker_left_do_not_pile_up() -> None:
    job = Job()
    job.join(hello(0, 2, 1))
    outbox = job.join(hello(1, 2, 1))
    with at_most(16 * 2**20, seconds=100):
        for serial in range(5000):
            job.handle(0, said(FOUR * 2, gather=pb.Gather(kind=pb.METRICS, serial=serial)))
            while outbox._messages.qsize():  # noqa: SLF001
                outbox._messages.get()  # noqa: SLF001
            while (own := job._streams[0])._messages.qsize():  # noqa: SLF001
                own._messages.get()  # noqa: SLF001
    assert len(job._gathers._gathers._gathers) <= 1001  # noqa: SLF001


def test_requests_for_states_do_not_pile_up() -> None:
    job = Job()
    for worker in range(2):
        job.join(hello(worker, 2, 1))
    job.handle(0, said(FOUR, contribution=part(num_slices=1)))
    finished = pb.RunFinished(exchanges=1, fate=Fate.CONTRIBUTED)
    job.handle(0, said(run_finished=finished))
    ask = said(state_request=pb.StateRequest())
    for _ in range(16):
        job.handle(1, ask)
    with pytest.raises(Refused, match="at most 16 answers"):
        job.handle(1, ask)
    job.lost(0, "it is gone")


def test_results_for_a_worker_far_behind_are_few_if_they_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tf_syncdist.aggregation.history._MOST_RUNS_KEPT", 50)
    job = Job()
    for worker in range(2):
        job.join(hello(worker, 2, 1, history_bytes=2**62, history_rounds=4))
    for run in range(200):
        job.handle(0, said(FOUR, contribution=part(run, num_slices=1)))
        finished = pb.RunFinished(run=run, exchanges=1, fate=Fate.CONTRIBUTED)
        job.handle(0, said(run_finished=finished))
    assert 190 >= job._rounds.kept_from >= 149  # noqa: SLF001


# Streams.


@contextlib.contextmanager
def channels_to(address: str, count: int) -> Iterator[list[grpc.Channel]]:
    """Opens channels, each with a connection of its own."""
    options = (*wire.CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(grpc.insecure_channel(address, options)) for _ in range(count)]


def end(call: grpc.Call) -> grpc.StatusCode:
    """Reads a stream to its end and returns the status."""
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    return call.code()


def hello_of(service: object, worker: int, b: int = 0) -> bytes:
    """The first message of a worker that believes what the service's sessions do."""
    same = {n: getattr(service.config, n) for n in ("history_rounds", "history_bytes")}
    body = hello(worker, service.config.num_workers, b, **same)
    return wire.encode(pb.ToAggregator(hello=body))


def hang(over: threading.Event, *first: bytes) -> Iterator[bytes]:
    """Sends something, and then neither more nor an end."""
    yield from first
    over.wait(30)


def test_streams_that_say_nothing_are_ended_and_few(serve: Serve) -> None:
    limits = Limits(hello_seconds=60, waiting_streams=6, waiting_streams_per_peer=4)
    service = serve(1, limits=limits)
    (server,), over = service.servers, threading.Event()
    with channels_to(service.config.addresses[0], 3) as channels:

        def six() -> list[grpc.Call]:
            trains = [channels[i % 3].stream_stream(wire.TRAIN) for i in range(6)]
            return [train(hang(over), timeout=60) for train in trains]

        silent = six()
        service.until(lambda: server._waiting._peers.total() == 6)  # noqa: SLF001
        assert [end(call) for call in six()] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 6
        for call in silent:
            call.cancel()
        service.until(lambda: not server._waiting._peers)  # noqa: SLF001
        # Who is slow to say Hello would be refused, too.
        server._limits = limits._replace(hello_seconds=1.5)  # noqa: SLF001
        assert [end(call) for call in six()] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 6
        server._limits = limits  # noqa: SLF001
    over.set()
    refused = server.refused
    assert refused == {"stream without Hello in time": 6, "stream too many": 6}
    session = service.session(0)
    session.send(0, 0, WAY, [np.ones(4, "f4")])
    assert session.receive(0, 0, WAY, [np.empty(4, "f4")]) == (1, 1)
    session.close()
    service.until(lambda: not any(t.name == "tf_syncdist_reader" for t in threading.enumerate()))


def test_one_connection_cannot_take_all_streams(serve: Serve) -> None:
    limits = Limits(hello_seconds=20, waiting_streams=6, waiting_streams_per_peer=2)
    service = serve(1, limits=limits)
    over = threading.Event()
    with channels_to(service.config.addresses[0], 1) as (channel,):
        calls = [channel.stream_stream(wire.TRAIN)(hang(over), timeout=20) for _ in range(4)]
        service.until(lambda: service.servers[0].refused == {"stream too many": 2})
        session = service.session(0)
        assert session.report().refused["stream too many"] == 2
        session.close()
        for call in calls:
            call.cancel()
    over.set()
    service.until(lambda: not service.servers[0]._streams._streams)  # noqa: SLF001
    assert service.servers[0].refused["stream too many"] == 2


def test_a_worker_that_reads_nothing_is_given_up(serve: Serve) -> None:
    """What others gather is sent to it, of which gRPC takes some bytes; others go on."""
    service = serve(2, b=1, limits=Limits(worker_bytes=2**24), transport="grpc")
    over = threading.Event()
    first = hello_of(service, 1, b=1)
    with channels_to(service.config.addresses[0], 1) as (channel,):
        call = channel.stream_stream(wire.TRAIN)(hang(over, first), timeout=60)
        service.until(lambda: any("worker 1 joined" in e for e in service.events))
        session = service.session(0)
        for serial in range(12):
            values = np.ones(2**19)
            assert session.gather(pb.METRICS, serial, 0, values=values).contributors == (0,)
        service.until(lambda: any("worker 1 is gone" in e for e in service.events))
        assert service.servers[0].refused == {"worker that does not read": 1}
        session.send(0, 0, WAY, [np.ones(4, "f4")])
        assert session.receive(0, 0, WAY, [np.empty(4, "f4")]) == (1, 1)
        assert end(call) == grpc.StatusCode.CANCELLED
    over.set()


def test_results_do_not_count_for_a_worker_that_is_slow_to_read(serve: Serve) -> None:
    """They are the same bytes for all, which the service keeps anyway."""
    elements = 2**20
    way = plan([TensorSpec("float32", (elements,))], 2**24, 1)
    service = serve(2, b=1, limits=Limits(worker_bytes=2**23), transport="grpc")
    over = threading.Event()
    with channels_to(service.config.addresses[0], 1) as (channel,):
        first = hello_of(service, 1, b=1)
        call = channel.stream_stream(wire.TRAIN)(hang(over, first), timeout=60)
        service.until(lambda: any("worker 1 joined" in e for e in service.events))
        session = service.session(0)
        for run in range(4):
            session.send(run, 0, way, [np.ones(elements, "f4")])
            assert session.receive(run, 0, way, [np.empty(elements, "f4")])
            session.finish(run, 1, Fate.CONTRIBUTED)
        results = []
        for data in call:
            header, payload = wire.decode(pb.ToWorker, data)
            if header.WhichOneof("body") == "result":
                results.append((header.result.run, payload.nbytes))
            if len(results) == 4:
                break
        assert results == [(run, 4 * elements) for run in range(4)]
        assert service.servers[0].refused == {}
        call.cancel()
    over.set()


def test_what_a_stuck_stream_was_refused_for_does_not_hold_a_thread(serve: Serve) -> None:
    """A worker that is refused but does not read that far."""
    elements = 2**22
    way = plan([TensorSpec("float32", (elements,))], 2**26, 1)
    service = serve(2, b=1, limits=Limits(leaving_seconds=0.5), transport="grpc")
    over, more = threading.Event(), threading.Event()

    def stranger() -> Iterator[bytes]:
        yield hello_of(service, 1, b=1)
        more.wait(30)
        yield b"nonsense"
        over.wait(30)

    with channels_to(service.config.addresses[0], 1) as (channel,):
        call = channel.stream_stream(wire.TRAIN)(stranger(), timeout=60)
        service.until(lambda: any("worker 1 joined" in e for e in service.events))
        session = service.session(0)
        for run in range(4):
            session.send(run, 0, way, [np.ones(elements, "f4")])
            assert session.receive(run, 0, way, [np.empty(elements, "f4")])
            session.finish(run, 1, Fate.CONTRIBUTED)
        more.set()
        service.until(lambda: any("worker 1 is gone" in e for e in service.events))
        service.until(lambda: len(service.servers[0]._streams._streams) == 1)  # noqa: SLF001
        assert end(call) != grpc.StatusCode.OK
    over.set()


def test_who_is_not_of_the_job_is_counted_as_that(serve: Serve) -> None:
    service = serve(2)
    session = service.session(0)
    with channels_to(service.config.addresses[0], 1) as (channel,):
        for worker, b in ((2, 0), (7, 0), (1, 1), (0, 0)):
            messages = iter([hello_of(service, worker, b)])
            call = channel.stream_stream(wire.TRAIN)(messages, timeout=20)
            assert end(call) != grpc.StatusCode.OK
    assert dict(session.report().refused) == {
        "worker that is not of this job": 3,
        "worker that is there already": 1,
    }


def test_an_error_of_the_service_is_no_orderly_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Job, *_: object) -> None:
        raise ZeroDivisionError("of the test")

    count = TrainStream._count  # noqa: SLF001

    def count_last(stream: TrainStream, refusal: Refused) -> None:
        # Where the worker hears of it first, the end of its stream may be what is noticed first.
        service.until(lambda: any("worker 1 is gone" in e for e in service.events))
        count(stream, refusal)

    monkeypatch.setattr(Job, "_on_enter_pass", fail)
    monkeypatch.setattr(TrainStream, "_count", count_last)
    caplog.set_level(logging.ERROR)
    service = serve(2)
    other = service.session(0)
    with channels_to(service.config.addresses[0], 1) as (channel,):
        messages = [hello_of(service, 1), said(enter_pass=pb.EnterPass())]
        call = channel.stream_stream(wire.TRAIN)(iter(messages), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError: of the test" in caught.value.details()
    assert any("worker 1 is gone (the service failed" in e for e in service.events)
    assert service.servers[0].refused == {"message on which the service failed": 1}
    assert "ZeroDivisionError: of the test" in caplog.text
    other.send(0, 0, WAY, [np.ones(4, "f4")])
    assert other.receive(0, 0, WAY, [np.empty(4, "f4")]) == (1, 1)


def test_the_clock_goes_on_after_an_error(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks: list[float] = []

    def fail(self: Job) -> None:
        ticks.append(time.monotonic())
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(Job, "tick", fail)
    service = serve(1)
    service.until(lambda: len(ticks) >= 3)
    service.close()
    assert "of the test" in caplog.text


def test_a_connection_without_a_greeting_is_closed(serve: Serve) -> None:
    host, port = serve(1).config.addresses[0].split(":")
    with contextlib.ExitStack() as stack:
        clients = []
        # One is silent, one stops in the middle of its greeting.
        for first in (b"", b"PRI * HTTP/2.0"):
            client = socket.create_connection((host, int(port)), timeout=25)
            clients.append(stack.enter_context(client))
            client.sendall(first)
        for client in clients:
            while client.recv(4096):
                pass
