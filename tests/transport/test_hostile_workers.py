"""Workers that could harm the service by what they claim: it neither waits nor grows by it."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

from .hostile import at_most, hello

Serve = Callable[..., object]
FOUR = np.ones(4, "<f4").tobytes()
GOOD = {"num_slices": 1, "dtype": pb.FLOAT32, "elements": 4}


def test_a_number_of_exchanges_is_not_counted_through() -> None:
    job = Job()
    job.join(hello(0, 1, 0))
    body = pb.RunFinished(exchanges=2**32 - 1, fate=Fate.CONTRIBUTED)
    with at_most():
        job.handle(0, wire.encode(pb.ToAggregator(run_finished=body)))


@pytest.mark.parametrize("changes", [{"run": 7}, {"num_slices": 0}], ids=str)
def test_where_sums_are_made_in_order_nonsense_is_refused_out_of_turn(
    serve: Serve, changes: dict[str, int]
) -> None:
    job = Job()
    for worker in range(2):
        job.join(hello(worker, 2, 0, deterministic=True))
    body = pb.Contribution(**{**GOOD, **changes})
    data = wire.encode(pb.ToAggregator(contribution=body), FOUR)
    with pytest.raises(Refused, match="Expected"):
        serve(1).together(lambda: job.handle(1, data))


@pytest.fixture
def sealed() -> Iterator[Callable[..., pb.Segment]]:
    """Makes memory that is not made by `Segment.create`; its descriptors are closed."""
    with contextlib.ExitStack() as stack:

        def make(size: int, number: int = 0, filled: bool = True, seals: int = 0x1F) -> pb.Segment:
            fd = os.memfd_create("tf_syncdist_test", os.MFD_ALLOW_SEALING)
            stack.callback(os.close, fd)
            os.ftruncate(fd, 4096 + size)
            os.pwrite(fd, b"t" * 16, 0)
            if filled:
                os.posix_fallocate(fd, 0, 4096 + size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals & ~fcntl.F_SEAL_WRITE)
            return pb.Segment(id=number, pid=os.getpid(), fd=fd, size=size, token=b"t" * 16)

        yield make


def answers(job: Job, outbox: object, *segments: pb.Segment) -> list[str]:
    """What the service says to segments of worker 0."""
    for segment in segments:
        job.handle(0, wire.encode(pb.ToAggregator(segment=segment)))
    found: list[str] = []
    while len(found) < len(segments):
        told, _ = wire.decode(pb.ToWorker, outbox._messages.get(timeout=5))  # noqa: SLF001
        if told.HasField("segment_answer"):
            found.append(told.segment_answer.error)
    return found


def test_memory_with_which_the_service_could_be_harmed_is_not_used(
    sealed: Callable[..., pb.Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job()
    outbox = job.join(hello(0, 1, 0, host=job._host))  # noqa: SLF001
    outbox._messages.get(timeout=5)  # noqa: SLF001 - the welcome
    size = 2**20 + 8
    good = sealed(size)
    holes, shrinks, pierced = (
        sealed(2**40, 1, filled=False),
        sealed(size, 2, seals=fcntl.F_SEAL_GROW),
        sealed(size, 3, seals=fcntl.F_SEAL_SHRINK),
    )
    with at_most():
        ok, *errors = answers(job, outbox, good, holes, shrinks, pierced, good)
    assert not ok
    for error, why in zip(errors, ("smaller", "shrunk", "shrunk", "already"), strict=True):
        assert why in error
    before = len(os.listdir("/proc/self/fd"))
    many = answers(job, outbox, *(pb.Segment.FromString(_numbered(good, n)) for n in range(4, 200)))
    assert not many[0] and "64 segments" in many[-1]
    assert len(os.listdir("/proc/self/fd")) < before + 70
    monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", 2**20)
    body = pb.Contribution(**{**GOOD, "elements": size // 4, "location": pb.Location()})
    with at_most(), pytest.raises(Refused, match="at most 1048576 bytes"):
        job.handle(0, wire.encode(pb.ToAggregator(contribution=body)))
    assert not job._rounds.arrived(0)  # noqa: SLF001


def _numbered(segment: pb.Segment, number: int) -> bytes:
    other = pb.Segment()
    other.CopyFrom(segment)
    other.id = number
    return other.SerializeToString()


def test_a_worker_of_another_host_offers_no_memory(sealed: Callable[..., pb.Segment]) -> None:
    job = Job()
    job.join(hello(0, 1, 0))
    with pytest.raises(Refused, match="own host"):
        job.handle(0, wire.encode(pb.ToAggregator(segment=sealed(100))))


@pytest.mark.parametrize("text", ["x" * 300_000, "\\ud800", "\u2028\n" * 2000], ids=range(3))
def test_a_refusal_that_quotes_a_worker_can_be_sent(serve: Serve, text: str) -> None:
    policy = '{"class_name": "FullSync", "config": {"' + text + '": 1}}'
    for joined in (False, True):
        service = serve(1)
        if joined:
            service.session(0)
        message = wire.encode(pb.ToAggregator(hello=hello(0, 1, 0, cutoff=policy)))
        with grpc.insecure_channel(service.config.addresses[0]) as channel:
            call = channel.stream_stream(wire.TRAIN)(iter([message]), timeout=30)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10_000,
        "[" * 100_000,
        "9" * 10_000,
        "null",
        '{"class_name": [], "config": {}}',
        '{"class_name": "BackupWorkers", "config": {"b": 1e999}}',
        '{"class_name": "BackupWorkers", "config": {"b": -1}}',
        '{"class_name": "BackupWorkers", "config": []}',
        '{"class_name": "FullSync", "config": {"\\ud800": 1}}',
    ],
    ids=range(9),
)
def test_a_cutoff_that_is_none_is_refused(text: str) -> None:
    with at_most(), pytest.raises(Refused) as caught:
        Job().join(hello(0, 3, 0, cutoff=text))
    assert caught.value.details.encode() and len(caught.value.details) < 2000
