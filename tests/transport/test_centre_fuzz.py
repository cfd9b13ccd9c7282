"""Strangers at the centre: whatever they send, it is answered or refused, and others go on."""

from collections.abc import Callable

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_syncdist.aggregation.job import Job
from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.mixing.centre_policies import AsyncCentre, ElasticCentre, deserialize, serialize
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

from .hostile import at_most, hello
from .test_service_fuzz import FUZZ, NEAR, REFUSED, numbers

Serve = Callable[..., object]
WAY = plan([TensorSpec("float32", (4,))], 8, 1)
TWO = np.ones(2, "<f4").tobytes()
OPEN = {
    "variables": [pb.VariableSpec(name="v", dtype="float32", shape=[4])],
    "layout": WAY.layout,
    "num_slices": 2,
}
REQUEST = {"dtype": pb.FLOAT32, "elements": 2, "layout": WAY.layout, "serial": 1}
ASYNC = serialize(AsyncCentre())


def message(body: str, fields: dict, payload: bytes = b"") -> bytes:
    """One message of a worker."""
    cls = {"centre_open": pb.CentreOpen, "centre_request": pb.CentreRequest}[body]
    return wire.encode(pb.ToAggregator(**{body: cls(**fields)}), payload)


def changed(cls: type, good: dict) -> st.SearchStrategy:
    """Fields of which some are anything, and most are right."""
    fields = {f.name: numbers(f, NEAR) for f in cls.DESCRIPTOR.fields if f.name != "variables"}
    return st.fixed_dictionaries({}, optional=fields).map(lambda changes: {**good, **changes})


SAID = st.one_of(
    st.builds(lambda f: message("centre_open", f), changed(pb.CentreOpen, OPEN)),
    st.builds(
        lambda a, s, f, p: message("centre_request", {**f, "action": a, "slice": s}, p),
        st.sampled_from([pb.CENTRE_READ, pb.CENTRE_MIX, pb.CENTRE_GIVE, 0, 9]),
        st.sampled_from([0, 1, 2, 2**32 - 1]),
        st.just(REQUEST) | changed(pb.CentreRequest, REQUEST),
        st.sampled_from([b"", TWO]) | st.binary(max_size=20),
    ),
)


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 3), SAID), max_size=14),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_job_refuses_or_does_what_it_is_told(
    messages: list[tuple[int, bytes]], elastic: bool, shares: bool, is_given: bool
) -> None:
    job = Job()
    host = job._host if shares else ""  # noqa: SLF001
    centre = serialize(ElasticCentre(0.5)) if elastic else ASYNC
    outboxes = [job.join(hello(w, 4, 0, host=host, centre=centre)) for w in range(4)]
    good = [(w, message("centre_open", OPEN)) for w in range(4)]
    if is_given:
        for part in (0, 1):
            give = {**REQUEST, "action": pb.CENTRE_GIVE, "slice": part}
            good.append((0, message("centre_request", give, TWO)))
    for worker, data in (*good, *messages):
        with at_most():
            try:
                job.handle(worker, data)
            except Refused as e:
                assert e.code in REFUSED
                assert 10 < len(e.details) < 2000
                job.lost(worker, "it was refused")
        job.tick()
    # Each worker may be at a centre of its own.
    assert job.report().centre_bytes <= 4 * 4 * 8
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
@given(st.lists(SAID, max_size=6), st.integers(1, 3))
def test_a_stranger_changes_nothing_but_by_its_own_values(messages: list[bytes], who: int) -> None:
    """What worker 0 adds is in the centre, also after a stranger was refused."""
    job = Job()
    for worker in range(4):
        job.join(hello(worker, 4, 0, centre=ASYNC))
        job.handle(worker, message("centre_open", OPEN))
    for part in (0, 1):
        give = {**REQUEST, "action": pb.CENTRE_GIVE, "slice": part}
        job.handle(0, message("centre_request", give, TWO))
    for data in messages:
        try:
            job.handle(who, data)
        except Refused:
            job.lost(who, "it was refused")
    for serial in range(3):
        add = {**REQUEST, "action": pb.CENTRE_MIX, "slice": 0, "serial": 10 + serial}
        job.handle(0, message("centre_request", add, TWO))
    assert job.report().workers[0].mixed == 3


@pytest.mark.parametrize(
    "messages, why",
    [
        ([("centre_request", {**REQUEST, "action": pb.CENTRE_READ})], "have said which variables"),
        ([("centre_open", OPEN), ("centre_request", REQUEST)], "Expected a known action"),
        (
            [("centre_open", OPEN), ("centre_request", {**REQUEST, "action": pb.CENTRE_READ})],
            "a slice of the centre that is there",
        ),
        ([("centre_open", {**OPEN, "num_slices": 2**31})], "Expected a centre of at most"),
    ],
    ids=["unsaid", "action", "missing", "slices"],
)
def test_what_is_refused(messages: list[tuple[str, dict]], why: str) -> None:
    job = Job()
    for worker in range(2):
        job.join(hello(worker, 2, 0, centre=ASYNC))
    with pytest.raises(Refused, match=why) as caught:
        for body, fields in messages:
            job.handle(1, message(body, fields))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_centre_that_is_too_large_is_refused() -> None:
    job = Job(worker_bytes=2**20)
    job.join(hello(0, 2, 0, centre=ASYNC))
    large = {**OPEN, "variables": [pb.VariableSpec(name="v", dtype="float32", shape=[2**40])]}
    with pytest.raises(Refused, match="--max_worker_bytes"):
        job.handle(0, message("centre_open", large))


def test_nobody_gives_the_centre_who_was_not_asked() -> None:
    job = Job()
    for worker in range(2):
        job.join(hello(worker, 2, 0, centre=ASYNC))
        job.handle(worker, message("centre_open", OPEN))
    give = {**REQUEST, "action": pb.CENTRE_GIVE, "slice": 0}
    with pytest.raises(Refused, match="from the worker that was asked for it"):
        job.handle(1, message("centre_request", give, TWO))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"class_name": "Centre", "config": {}}', "[" * 5000, '{"config": 1}']
)
def test_unknown_rules(text: str) -> None:
    with pytest.raises(ValueError, match="Expected a policy of a centre as JSON"):
        deserialize(text)


@pytest.mark.parametrize("policy", [ElasticCentre(0.25), AsyncCentre(), AsyncCentre(3)])
def test_a_policy_comes_back_as_it_was(policy: object) -> None:
    assert deserialize(serialize(policy)) == policy


@pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan"), "a", None])
def test_moving_rates_that_cannot_be(rate: object) -> None:
    with pytest.raises(ValueError, match="moving_rate"):
        ElasticCentre(rate)


@pytest.mark.parametrize("bound", [-1, 1.5, True, "a"])
def test_bounds_that_cannot_be(bound: object) -> None:
    with pytest.raises(ValueError, match="max_staleness"):
        AsyncCentre(bound)
