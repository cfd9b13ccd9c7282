"""Messages as bytes: valid protobuf, and nothing but WireError for anything else."""

import random

import numpy as np
import pytest

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

HEADERS = [
    pb.ToAggregator(hello=pb.Hello(protocol=1, worker=3, cutoff="{}", history_bytes=2**63)),
    pb.ToAggregator(contribution=pb.Contribution()),
    pb.ToAggregator(
        contribution=pb.Contribution(
            run=2**40,
            exchange=1,
            slice=2,
            num_slices=9,
            dtype=pb.INT64,
            elements=5,
            layout=2**64 - 1,
        )
    ),
    pb.ToAggregator(gather=pb.Gather(run=1, layout=7, hashes=[0, 2**64 - 1])),
    pb.ToAggregator(
        manifest=pb.Manifest(variables=[pb.VariableSpec(name="kernel/ä", shape=[-1, 2**40])])
    ),
    pb.ToWorker(result=pb.Result(run=1, contributors=[2, 0, 1])),
    pb.ToWorker(all_gone=pb.AllGone()),
    pb.ToWorker(state_chunk=pb.StateChunk(request=1, total=100)),
]
# Around the sizes where the length takes one more byte.
SIZES = [1, 2, 127, 128, 129, 16383, 16384, 2**20, 2**21 + 1]


def ids(header: object) -> str:
    """Names a case by the message's body."""
    return header.WhichOneof("body")


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("header", HEADERS, ids=ids)
def test_messages_are_what_protobuf_itself_would_write(header: object, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    data = wire.encode(header, payload)
    whole = type(header)()
    whole.CopyFrom(header)
    whole.payload = payload
    assert data == whole.SerializeToString()
    assert type(header).FromString(data) == whole
    back, view = wire.decode(type(header), data)
    assert back == header and bytes(view) == payload


def test_the_payload_is_a_view_and_not_a_copy() -> None:
    data = wire.encode(HEADERS[1], b"abc")
    _, view = wire.decode(pb.ToAggregator, data)
    assert view.obj is data and view.readonly


def test_pieces_of_any_type_are_joined() -> None:
    floats = np.arange(3, dtype="<f4")
    pieces = [b"ab", memoryview(floats), b"", memoryview(floats)[1:2].cast("B"), bytearray(b"z")]
    data = wire.encode(HEADERS[1], *pieces)
    expected = b"ab" + floats.tobytes() + floats[1:2].tobytes() + b"z"
    assert pb.ToAggregator.FromString(data).payload == expected
    assert bytes(wire.decode(pb.ToAggregator, data)[1]) == expected


def test_an_empty_payload_field_is_an_empty_payload() -> None:
    data = HEADERS[1].SerializeToString() + b"\x7a\x00"
    assert wire.decode(pb.ToAggregator, data) == (HEADERS[1], b"")


def test_fields_of_later_versions_are_skipped() -> None:
    later = b"".join(
        [
            b"\x80\x02\x96\x01",  # field 32, a varint
            b"\x89\x02" + bytes(8),  # field 33, 64 bits
            b"\x95\x02" + bytes(4),  # field 34, 32 bits
            b"\x9a\x02\x03abc",  # field 35, of a length
        ]
    )
    header, payload = wire.decode(pb.ToAggregator, later + wire.encode(HEADERS[1], b"abc"))
    assert header.WhichOneof("body") == "contribution" and payload == b"abc"


HEAD = HEADERS[2].SerializeToString()


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "without one"),
        (b"\x7a\x03abc", "without one"),
        (b"\xa2\x06\x00", "without one"),
        (HEAD + b"\x7a\x03abc" + HEAD, "last field"),
        (HEAD + b"\x7a\x03abc\x7a\x03abc", "last field"),
        (HEAD + b"\x7a\x04abc", "4 more bytes. Received: 3"),
        (HEAD + b"\x7a", "a part"),
        (HEAD + b"\x7a\x80", "a part"),
        (HEAD[:-1], "more bytes"),
        (HEAD + b"\x79abc", "a part"),
        (HEAD + b"\x7d\x00", "a part"),
        (HEAD + b"\x7b", "wire type 3"),
        (HEAD + b"\x7f", "wire type 7"),
        (HEAD + b"\x7a" + b"\xff" * 10, "64 bits"),
        (HEAD + b"\x7a" + b"\xff" * 8 + b"\x7f", "more bytes"),
        (HEAD + b"\x02\x00", "Received: "),  # There is no field 0.
        (b"\x0a\x03\x2a\x01\xff", "Received: 5 bytes"),  # A cutoff that is no UTF-8.
        (b"\x12\x02\x08", "Received: "),
    ],
)
def test_malformed_messages(data: bytes, why: str) -> None:
    with pytest.raises(wire.WireError) as error:
        wire.decode(pb.ToAggregator, data)
    assert why in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("cls", [pb.ToAggregator, pb.ToWorker])
@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_are_a_message_or_a_wire_error(cls: type, seed: int) -> None:
    """What is accepted, protobuf accepts too, and with the same payload."""
    rng = random.Random(seed)
    valid = [wire.encode(h, rng.randbytes(rng.randint(0, 20))) for h in HEADERS if type(h) is cls]
    tags = [field << 3 | kind for field in (*range(12), 15, 16) for kind in range(8)]
    accepted = 0
    for _ in range(3000):
        data = bytearray(rng.choice(valid))
        for _ in range(rng.randint(0, 3)):
            at = rng.randint(0, len(data))
            how = rng.randrange(5)
            if how == 0:
                data[at:] = b""
            elif how == 1:
                data[at : at + 1] = rng.randbytes(1)
            elif how == 2:
                data[at:at] = rng.randbytes(rng.randint(1, 4))
            elif how == 3:
                data[at:at] = bytes([rng.choice(tags)])
            else:
                data = bytearray(rng.randbytes(rng.randint(0, 30)))
        try:
            header, payload = wire.decode(cls, bytes(data))
        except wire.WireError:
            continue
        accepted += 1
        assert header.WhichOneof("body") is not None
        whole = cls.FromString(bytes(data))
        assert whole.payload == bytes(payload)
        assert whole.WhichOneof("body") == header.WhichOneof("body")
    assert 300 < accepted < 2900
