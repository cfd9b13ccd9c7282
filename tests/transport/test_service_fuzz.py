"""A service among strangers: whatever they send, it answers, stays small, and others go on.

`test_job_*` go without gRPC, so that far more can be tried; there the strangers are in the very
round of the others, which they may spoil, but not by anything else than a refusal.
"""

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tf_syncdist import cutoff
from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.session import Session

from .hostile import at_most, hello

Serve = Callable[..., object]
FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
WAY = plan([TensorSpec("float32", (4,))], 100, 1)
FOUR = np.ones(4, "<f4").tobytes()
GOOD = {"num_slices": 1, "dtype": pb.FLOAT32, "elements": 4, "layout": WAY.layout}
STRANGERS = 500

# What no correct worker sends, and what is too much of something.
REFUSED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
CLEAN = {grpc.StatusCode.OK, *REFUSED}

NEAR = (0, 1, 2, 3)
FAR = (2**31, 2**32 - 1)
FURTHER = (2**60, 2**63, 2**64 - 1)


def numbers(field: object, near: tuple[int, ...]) -> st.SearchStrategy:
    """What a stranger may write into a field."""
    if field.type == field.TYPE_MESSAGE:
        return bodies(field.message_type, near)
    return {
        field.TYPE_UINT32: st.sampled_from(near + FAR),
        field.TYPE_UINT64: st.sampled_from(near + FAR + FURTHER),
        field.TYPE_FIXED64: st.sampled_from(near + FAR + FURTHER),
        field.TYPE_INT64: st.sampled_from([-(2**63), -1, 0, 5, 2**63 - 1]),
        field.TYPE_ENUM: st.sampled_from([0, 1, 2, 3, 4, 5, 77, -1]),
        field.TYPE_BOOL: st.booleans(),
        field.TYPE_DOUBLE: st.sampled_from([0.0, 3.0, -1.0, float("inf"), float("nan")]),
        field.TYPE_FLOAT: st.sampled_from([0.0, 3.0, -1.0, float("inf"), float("nan")]),
        field.TYPE_STRING: st.sampled_from(["", "x", "ä\n" * 3000]),
        field.TYPE_BYTES: st.binary(max_size=16),
    }[field.type]


def bodies(descriptor: object, near: tuple[int, ...]) -> st.SearchStrategy:
    """Messages whose every field is anything."""
    fields = {}
    for field in descriptor.fields:
        one = numbers(field, near)
        many = st.lists(one, max_size=3) | one.map(lambda v: [v] * 2000)
        fields[field.name] = many if field.is_repeated else one
    cls = descriptor._concrete_class  # noqa: SLF001
    return st.fixed_dictionaries({}, optional=fields).map(lambda f: cls(**f))


@functools.cache
def said(near: tuple[int, ...]) -> st.SearchStrategy:
    """Messages of a stranger who knows the contract, but for `Hello`."""
    fields = pb.ToAggregator.DESCRIPTOR.oneofs_by_name["body"].fields
    one_of = [
        numbers(f, near).map(lambda v, n=f.name: pb.ToAggregator(**{n: v}))
        for f in fields
        if f.name != "hello"
    ]
    # Mostly right, so that more than the first check is reached.
    changed = st.fixed_dictionaries(
        {},
        optional={
            f.name: numbers(f, near) for f in pb.Contribution.DESCRIPTOR.fields if f.name != "dtype"
        },
    ).map(lambda changes: pb.ToAggregator(contribution=pb.Contribution(**{**GOOD, **changes})))
    headers = st.one_of(*one_of, changed)
    payloads = st.sampled_from([b"", FOUR]) | st.binary(max_size=40)
    return st.builds(wire.encode, headers, payloads)


@st.composite
def broken(draw: st.DrawFn, near: tuple[int, ...]) -> bytes:
    """Messages, of which some are no longer such ones."""
    data = draw(said(near))
    at = draw(st.integers(0, min(60, len(data))))
    return draw(
        st.sampled_from(
            [
                data,
                data,
                data[:at],
                data[:at] + b"\xff" + data[at + 1 :],
                data + data,
                b"\x0b" + data,
            ]
        )
        | st.binary(max_size=50)
    )


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 3), broken(NEAR)), max_size=12),
    st.booleans(),
    st.sampled_from([0, 2]),
)
def test_job_refuses_or_does_what_it_is_told(
    messages: list[tuple[int, bytes]], shares: bool, b: int
) -> None:
    job = Job()
    host = job._host if shares else ""  # noqa: SLF001
    outboxes = [job.join(hello(w, 4, b, host=host)) for w in range(4)]
    good = wire.encode(pb.ToAggregator(contribution=pb.Contribution(**GOOD)), FOUR)
    messages = [(0, good), (1, good), *messages]
    for worker, data in messages:
        with at_most():
            try:
                job.handle(worker, data)
            except Refused as e:
                assert e.code in REFUSED
                assert 10 < len(e.details) < 2000
                job.lost(worker, "it was refused")
        job.tick()
    for worker, outbox in enumerate(outboxes):
        job.lost(worker, "the test is over")
        try:
            told = list(outbox.drain())
        except Refused:
            continue
        for data in told:
            wire.decode(pb.ToWorker, data)
    assert not job.in_progress


@FUZZ
@given(st.lists(bodies(pb.Hello.DESCRIPTOR, NEAR), max_size=4))
def test_job_lets_in_or_refuses(hellos: list[pb.Hello]) -> None:
    job = Job()
    for one in hellos:
        with at_most(), contextlib.suppress(Refused):
            job.join(one)
        job.tick()


class Arena:
    """A service on which two workers do rounds all the time, and strangers join."""

    def __init__(self, serve: Serve) -> None:
        policy = cutoff.serialize(cutoff.BackupWorkers(STRANGERS))
        self.service = serve(
            STRANGERS + 2, cutoff=policy, history_rounds=0, history_bytes=0, transport="auto"
        )
        self.address = self.service.config.addresses[0]
        self.done = [0, 0]
        self.failures: list[BaseException] = []
        self._indices = itertools.count(2)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(self.service.session(w),)) for w in range(2)
        ]
        for thread in self._threads:
            thread.start()
        self.go_on(10)

    def _work(self, session: Session) -> None:
        me = session.config.worker
        try:
            for run in itertools.count():
                out = np.zeros(4, "f4")
                session.send(run, 0, WAY, [np.full(4, (me + 1) * (run % 1000), "f4")])
                assert session.receive(run, 0, WAY, [out]) == (1, 1)
                assert out.tolist() == [3 * (run % 1000)] * 4
                session.finish(run, 1, Fate.CONTRIBUTED)
                self.done[me] = run + 1
                if self._stop.wait(0.002):
                    return
        except BaseException as e:  # noqa: BLE001 - the test looks at them
            if not self._stop.is_set():
                self.failures.append(e)

    def go_on(self, rounds: int = 2) -> None:
        """Waits for some more rounds of the honest workers."""
        goal = [d + rounds for d in self.done]
        self.service.until(
            lambda: self.failures or all(d >= g for d, g in zip(self.done, goal, strict=True))
        )
        assert not self.failures

    def hello(self) -> bytes:
        """The first message of a stranger who takes the place of a worker that has not come."""
        body = hello(next(self._indices), STRANGERS + 2, STRANGERS)
        body.history_bytes = body.history_rounds = 0
        body.host = self.service.servers[0].job._host  # noqa: SLF001
        return wire.encode(pb.ToAggregator(hello=body))

    def talk(self, *messages: bytes, cancel: bool = False) -> tuple[grpc.StatusCode, str]:
        """Sends messages and returns the status; or breaks the stream, and returns that."""
        with grpc.insecure_channel(self.address) as channel:
            call = channel.stream_stream(wire.TRAIN)(iter(messages), timeout=30)
            try:
                for _ in call:
                    if cancel:
                        call.cancel()
            except grpc.RpcError:
                pass
            return call.code(), call.details()

    def close(self) -> None:
        """Ends the rounds."""
        self._stop.set()
        self.service.close()
        for thread in self._threads:
            thread.join(20)


@pytest.fixture
def arena(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Arena]:
    """An arena in which no thread may end by an exception, and nothing is logged by gRPC."""
    unhandled: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    caplog.set_level(logging.WARNING)
    arena = Arena(serve)
    yield arena
    arena.go_on()
    arena.close()
    assert not unhandled and not caplog.records


def test_strangers_get_a_status_and_others_go_on(arena: Arena) -> None:
    codes = set()

    @settings(FUZZ, max_examples=60)
    @given(st.lists(broken((0, 1)), max_size=5), st.booleans())
    def attack(messages: list[bytes], says_hello: bool) -> None:
        first = (arena.hello(),) if says_hello else ()
        code, details = arena.talk(*first, *messages)
        assert code in CLEAN and (code == grpc.StatusCode.OK) == (not details), details
        assert not arena.failures
        codes.add(code)

    attack()
    assert codes >= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    assert not [e for e in arena.service.events if "broke: " in e]


def test_streams_that_break(arena: Arena) -> None:
    for number in range(30):
        first = [arena.hello()] if number % 3 else []
        code, _ = arena.talk(*first, cancel=True)
        assert code in CLEAN | {grpc.StatusCode.CANCELLED}
    with grpc.insecure_channel(arena.address) as channel:
        never = threading.Event()
        for _ in range(5):
            call = channel.stream_stream(wire.TRAIN)(iter(lambda: never.wait(60), True))
            time.sleep(0.02)
            call.cancel()
        never.set()
