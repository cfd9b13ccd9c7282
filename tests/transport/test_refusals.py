"""What the service answers to messages that no correct worker would send.

The messages are written with protobuf and gRPC alone.
"""

import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
WAY = plan([TensorSpec("float32", (4,))], 100, 1)
FOUR = np.ones(4, "<f4").tobytes()
GOOD = {"num_slices": 1, "dtype": pb.FLOAT32, "elements": 4, "layout": WAY.layout}
JOB = {
    "protocol": wire.PROTOCOL,
    "min_workers": 1,
    "detection_seconds": 3.0,
    "num_workers": 2,
    "num_shards": 1,
    "cutoff": '{"class_name": "FullSync", "config": {}}',
}


def talk(address: str, *messages: bytes, end: bool = True) -> tuple[grpc.StatusCode, str]:
    """Opens a stream, sends messages and returns the status with which the service ends it."""
    over = threading.Event()

    def outgoing() -> Iterator[bytes]:
        yield from messages
        if not end:
            over.wait(60)

    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream("/tf_syncdist.v1.Aggregation/Train")(outgoing(), timeout=30)
        try:
            for _ in call:
                pass
        except grpc.RpcError as e:
            return e.code(), e.details()
        finally:
            over.set()
        return call.code(), call.details()


def said(payload: bytes = b"", **body: object) -> bytes:
    """A message of a worker."""
    return pb.ToAggregator(payload=payload, **body).SerializeToString()


def hello(worker: int = 1, **changes: object) -> bytes:
    """The first message of a worker of `JOB`."""
    return said(hello=pb.Hello(**{**JOB, "worker": worker, **changes}))


def contribution(payload: bytes = FOUR, **changes: object) -> bytes:
    """A contribution like those of others but for the changes."""
    return said(payload, contribution=pb.Contribution(**{**GOOD, **changes}))


@pytest.fixture
def started(serve: Serve) -> tuple[str, Session, object]:
    """A job of two in which worker 0 has sent four floats; its address, session and service."""
    service = serve(2, cutoff=JOB["cutoff"], history_rounds=0, history_bytes=0)
    session = service.session(0)
    session.send(0, 0, WAY, [np.ones(4, "f4")])
    service.until(lambda: session.report().workers[0].delays)
    return service.config.addresses[0], session, service


@pytest.mark.parametrize(
    "payload, changes, named",
    [
        (bytes(32), {"dtype": pb.FLOAT64}, "4 x float64"),
        (FOUR, {"dtype": pb.INT32}, "4 x int32"),
        (bytes(20), {"elements": 5}, "5 x float32"),
        (FOUR, {"layout": 77}, "layout 000000000000004d"),
        (FOUR, {"num_slices": 2}, "in 2 slice(s)"),
        (FOUR, {"num_slices": 2, "slice": 1}, "in 2 slice(s)"),
    ],
    ids=["float64", "int32", "longer", "layout", "num_slices", "another slice"],
)
def test_another_shape_or_dtype_is_refused_and_both_are_named(
    started: tuple, payload: bytes, changes: dict[str, int], named: str
) -> None:
    address, session, service = started
    code, details = talk(address, hello(), contribution(payload, **changes))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    agreed = f"4 x float32 in 1 slice(s), layout {WAY.layout:016x}"
    assert agreed in details and named in details and "from worker 1" in details
    # Who was refused is not waited for, and its values are in no sum.
    result = np.empty(4, "f4")
    assert session.receive(0, 0, WAY, [result]) == (1, 1)
    assert result.tolist() == [2] * 4
    service.until(lambda: any("worker 1 is gone" in n for n in service.notices[0]))


@pytest.mark.parametrize(
    "message, why",
    [
        (contribution(dtype=pb.DATA_TYPE_UNSPECIFIED), "known dtype"),
        (contribution(dtype=99), "known dtype"),
        (contribution(FOUR[:-1]), "15 bytes"),
        (contribution(b""), "0 bytes"),
        (contribution(b"", elements=0), "Expected"),
        (contribution(slice=1), "slice=1"),
        (contribution(num_slices=0), "slice=0"),
        (contribution(run=1), "run=1"),
        (contribution(run=2**64 - 1), "run="),
        (said(late=pb.LateContribution(run=3)), "run=3"),
        (said(run_finished=pb.RunFinished(fate=Fate.CONTRIBUTED, exchanges=1)), "closed"),
        (said(run_finished=pb.RunFinished()), "fate=0"),
        (said(run_finished=pb.RunFinished(fate=77)), "fate=77"),
        (said(b"1234567", gather=pb.Gather(kind=pb.METRICS)), "7 bytes"),
        (said(gather=pb.Gather()), "kind=0"),
        (said(state_chunk=pb.StateChunk()), "variable 0 of 0"),
        (said(state_chunk=pb.StateChunk(num_variables=1)), "worker=1"),
        (hello(), "Hello once"),
        (b"", "body"),
        (b"\xff\xff\xff", "part"),
        (b"\xf2\x01\x00", "body"),
        (said(b"abc", goodbye=pb.Goodbye()) + said(goodbye=pb.Goodbye()), "last field"),
    ],
    ids=range(22),
)
def test_other_nonsense_is_refused_with_a_reason(started: tuple, message: bytes, why: str) -> None:
    address, session, _ = started
    code, details = talk(address, hello(), message, end=False)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert why in details
    assert session.receive(0, 0, WAY, [np.empty(4, "f4")]) == (1, 1)


@pytest.mark.parametrize(
    "messages, why",
    [
        ([], "Hello"),
        ([b""], "body"),
        ([contribution()], "Hello as the first message"),
        ([b"\xff"], "part"),
        ([hello(protocol=1)], "protocol=1"),
        ([hello(num_workers=0)], "num_workers=0"),
        ([hello(worker=2)], "worker=2"),
        ([hello(num_workers=3)], "`num_workers`"),
        ([hello(cutoff="x")], "`cutoff`"),
        ([hello(shard=1)], "`shard`"),
        ([hello(num_shards=2)], "`num_shards`"),
    ],
)
def test_a_stream_that_begins_otherwise_is_refused(
    serve: Serve, messages: list[bytes], why: str
) -> None:
    service = serve(2)
    address = service.config.addresses[0]
    job = service.servers[0].job
    done = threading.Thread(target=talk, args=(address, hello(0)))
    done.start()
    service.until(lambda: service.events)
    code, details = talk(address, *messages)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert why in details
    done.join(40)
    assert not job.done.is_set(), "worker 1 may still come"


@pytest.mark.parametrize(
    "changes",
    [{"cutoff": "x"}, {"num_workers": 0}, {"protocol": 0}, {"cutoff": "[" * 100_000}],
    ids=range(4),
)
def test_a_first_worker_that_is_refused_does_not_spoil_the_job(
    serve: Serve, changes: dict[str, object]
) -> None:
    service = serve(1)
    code, _ = talk(service.config.addresses[0], hello(0, **changes))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    session = service.session(0)
    session.send(0, 0, WAY, [np.ones(4, "f4")])
    assert session.receive(0, 0, WAY, [np.empty(4, "f4")]) == (1, 1)


def test_after_goodbye_a_worker_says_nothing_more(started: tuple) -> None:
    address, session, _ = started
    goodbye = said(goodbye=pb.Goodbye(reason=pb.FAILED))
    code, details = talk(address, hello(), goodbye, contribution(), end=False)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "worker=1" in details
    assert session.receive(0, 0, WAY, [np.empty(4, "f4")]) == (1, 1)


def test_a_repeated_contribution_is_added_once(started: tuple) -> None:
    address, session, _ = started
    code, _ = talk(address, hello(), contribution(), contribution())
    assert code == grpc.StatusCode.OK
    result = np.empty(4, "f4")
    assert session.receive(0, 0, WAY, [result]) == (1, 1)
    assert result.tolist() == [2] * 4
