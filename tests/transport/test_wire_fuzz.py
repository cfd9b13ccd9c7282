"""Any bytes are a message or a `WireError`, and cost hardly more memory than they have."""

import tracemalloc

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.proto import tf_syncdist_peers_pb2 as peers_pb
from tf_syncdist.transport import wire

FUZZ = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ALL = (pb.ToAggregator, pb.ToWorker, peers_pb.ToPeer, peers_pb.FromPeer)
CLASSES = st.sampled_from(ALL)
# Python's objects around a message, and what NumPy or protobuf says about it.
SPARE_BYTES = 64 * 2**10


def values_of(field: object) -> st.SearchStrategy:
    """Anything that a field may hold."""
    kind, kinds = field.type, field
    if kind == kinds.TYPE_MESSAGE:
        return messages(field.message_type._concrete_class)  # noqa: SLF001
    if kind == kinds.TYPE_ENUM:
        return st.integers(-(2**31), 2**31 - 1)
    if kind == kinds.TYPE_STRING:
        return st.text(max_size=20)
    if kind == kinds.TYPE_BYTES:
        return st.binary(max_size=20)
    if kind == kinds.TYPE_BOOL:
        return st.booleans()
    if kind == kinds.TYPE_UINT32:
        return st.sampled_from([0, 1, 127, 128, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
    if kind == kinds.TYPE_INT64:
        return st.integers(-(2**63), 2**63 - 1)
    return st.sampled_from([0, 1, 127, 128, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)


def messages(cls: type) -> st.SearchStrategy:
    """Messages of a class without presence of all of their fields."""
    fields = {}
    for field in cls.DESCRIPTOR.fields:
        one = values_of(field)
        fields[field.name] = st.lists(one, max_size=3) if field.is_repeated else one
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: cls(**given))


def headers(cls: type) -> st.SearchStrategy:
    """Messages of the contract with a body and without payload."""
    bodies = cls.DESCRIPTOR.oneofs_by_name["body"].fields
    return st.one_of([values_of(f).map(lambda v, n=f.name: cls(**{n: v})) for f in bodies])


HEADERS = {cls: headers(cls) for cls in ALL}


def varint(value: int) -> bytes:
    """A number as protobuf writes it; of more than ten bytes if it has more than 70 bits."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


VARINTS = st.one_of(
    st.integers(0, 2**77).map(varint),
    st.integers(0, 300).map(varint),
    st.sampled_from([b"\xff" * 9 + b"\x01", b"\x80" * 9 + b"\x00", b"\x80" * 10, b"\xff" * 10]),
)
# Tags of the fields that matter and of some others, of all wire types, groups among them.
TAGS = st.builds(
    lambda field, kind: varint(field << 3 | kind),
    st.sampled_from([0, 1, 2, 3, 5, 10, 15, 16, 17, 18, 19, 20, 2**29 - 1, 2**29, 2**60]),
    st.integers(0, 7),
)
FIELDS = st.one_of(
    st.builds(lambda t, v: t + v, TAGS, VARINTS),
    st.builds(lambda t, n, b: t + n + b, TAGS, VARINTS, st.binary(max_size=20)),
    # Field 15 where it must not be, and the padding.
    st.builds(lambda t, b: t + varint(len(b)) + b, st.just(b"\x7a"), st.binary(max_size=200)),
    st.builds(lambda t, b: t + varint(len(b)) + b, st.just(b"\x8a\x01"), st.binary(max_size=200)),
    st.integers(1, 300).map(lambda depth: b"\x0b" * depth + b"\x0c" * depth),
    st.integers(1, 300).map(lambda depth: b"\x0a\x7f" * depth),
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[type, bytes]:
    """A message of the contract to which a few things have happened."""
    cls = draw(CLASSES)
    data = wire.encode(draw(HEADERS[cls]), draw(st.binary(max_size=40)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, len(data)))
        how = draw(st.sampled_from(["flip", "cut", "double", "insert", "append", "lie"]))
        if how == "flip":
            data = data[:at] + bytes(b ^ draw(st.integers(1, 255)) for b in data[at : at + 1])
            data += draw(st.binary(max_size=3))
        elif how == "cut":
            data = data[:at] + data[to:]
        elif how == "double":
            data = data[:to] + data[at:]
        elif how == "insert":
            data = data[:at] + draw(FIELDS) + data[at:]
        elif how == "append":
            data += draw(FIELDS)
        else:
            # Often the length of a field, inside or outside.
            data = data[:at] + draw(VARINTS) + data[at + 1 :]
    return cls, data


def check(cls: type, data: bytes) -> None:
    """Reads bytes, and compares with what protobuf reads."""
    tracemalloc.start()
    try:
        header, payload = wire.decode(cls, data)
    except wire.WireError as e:
        assert 0 < len(str(e)) < 500
        header = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= len(data) + SPARE_BYTES
    try:
        whole = cls.FromString(data)
    except DecodeError:
        whole = None
    if header is None:
        return
    assert whole is not None and whole.payload == bytes(payload)
    assert payload.nbytes == 0 or payload.obj is data
    whole.ClearField("payload")
    header.ClearField("payload")
    assert header.SerializeToString(deterministic=True) == whole.SerializeToString(
        deterministic=True
    )
    assert header.WhichOneof("body") is not None


@FUZZ
@given(CLASSES, st.binary(max_size=300) | st.lists(FIELDS, max_size=6).map(b"".join))
def test_any_bytes(cls: type, data: bytes) -> None:
    check(cls, data)


@FUZZ
@given(mutated())
def test_mutated_messages(case: tuple[type, bytes]) -> None:
    check(*case)


SIZES = st.integers(0, 300) | st.sampled_from([16383, 16384, 2**20, 2**21 - 1, 2**21])


@settings(FUZZ, max_examples=200)
@given(CLASSES.flatmap(lambda cls: HEADERS[cls]), SIZES, st.integers(0, 255), st.integers(0, 900))
def test_what_is_written_is_read_again(header: object, size: int, fill: int, room: int) -> None:
    cls, payload = type(header), bytes([fill]) * size
    data = wire.encode(header, payload)
    assert wire.decode(cls, data) == (header, payload)
    frame = wire.Frame(size, room)
    assert frame.payload.ctypes.data % 16 == 0
    frame.payload[:] = fill
    try:
        framed = frame.seal(header)
    except wire.WireError as e:
        assert header.ByteSize() > room and "Expected a header" in str(e)
        return
    for message in (data, framed):
        found, payload_found = wire.decode(cls, message)
        assert payload_found == payload
        whole = cls.FromString(message)
        assert whole.payload == payload
        for one in (found, whole):
            one.ClearField("padding")
            one.ClearField("payload")
            assert one == header


@pytest.mark.parametrize(
    "data, why",
    [
        (b"\x92\x01\x00" * 2000, "at most 1000 fields"),
        (b"\x8a\x01" + varint(5 * 2**20) + bytes(5 * 2**20), "besides the payload"),
        (b"\x7a" + varint(2**28 - 2**22) + bytes(2**28 - 2**22), "Expected a payload of at most"),
    ],
    ids=["fields", "padding", "payload"],
)
def test_what_is_too_much_is_refused_before_it_is_parsed(data: bytes, why: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(wire.WireError, match=why):
            wire.decode(pb.ToAggregator, data)
        assert tracemalloc.get_traced_memory()[1] < SPARE_BYTES
    finally:
        tracemalloc.stop()
