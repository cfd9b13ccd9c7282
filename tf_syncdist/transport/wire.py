"""Messages of the contract as bytes, with the payload outside of protobuf objects.

A message is the ordinary serialization of its header followed by field 15, the payload. Writing
it by hand spares two copies of the bulk data on each side, and the bytes remain valid protobuf.
"""

from typing import TypeVar

from google.protobuf.message import DecodeError

from tf_syncdist.proto import tf_syncdist_pb2 as pb

PROTOCOL = 2
SERVICE = "tf_syncdist.v1.Aggregation"
TRAIN = f"/{SERVICE}/Train"
REPORT = f"/{SERVICE}/Report"

# Slices and states are cut to 1 MiB by the worker; metrics and batch-norm statistics, once per
# epoch, are one message. Nothing legitimate is larger than this.
MAX_MESSAGE_BYTES = 256 * 2**20

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A reconnecting client must not sit out gRPC's two-minute backoff.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)

_PAYLOAD_TAG = bytes([15 << 3 | 2])
_WIRE_VARINT, _WIRE_FIXED64, _WIRE_LENGTH, _WIRE_FIXED32 = 0, 1, 2, 5

Message = TypeVar("Message", pb.ToAggregator, pb.ToWorker)


class WireError(ValueError):
    """Bytes that are no message of the contract."""


def encode(header: pb.ToAggregator | pb.ToWorker, *pieces: bytes | memoryview) -> bytes:
    """Returns a message with `pieces`, one after the other, as its payload.

    Args:
        header: The message without payload.
        *pieces: Contiguous buffers.
    """
    head = header.SerializeToString()
    size = sum(memoryview(p).nbytes for p in pieces)
    if not size:
        return head
    return b"".join((head, _PAYLOAD_TAG, _varint(size), *pieces))


def decode(cls: type[Message], data: bytes) -> tuple[Message, memoryview]:
    """Returns the header and a view of the payload of a message.

    Args:
        cls: `ToAggregator` or `ToWorker`.
        data: The bytes of the message.

    Raises:
        WireError: If the bytes are no such message, or the payload is not its last field.
    """
    view = memoryview(data)
    start, payload = _find_payload(view)
    try:
        header = cls.FromString(bytes(view[:start]))
    except DecodeError as e:
        raise WireError(
            f"Expected a {cls.__name__} message. Received: {len(data)} bytes ({e})."
        ) from e
    if header.WhichOneof("body") is None:
        raise WireError(
            f"Expected a {cls.__name__} message with a body that this version knows. "
            f"Received: {len(data)} bytes without one."
        )
    return header, payload


def _find_payload(view: memoryview) -> tuple[int, memoryview]:
    position, end = 0, len(view)
    while position < end:
        start = position
        tag, position = _read_varint(view, position)
        number, kind = tag >> 3, tag & 7
        if kind == _WIRE_LENGTH:
            size, position = _read_varint(view, position)
            if size > end - position:
                raise WireError(f"Expected {size} more bytes. Received: {end - position}.")
            if number == 15:
                if position + size != end:
                    raise WireError("Expected the payload to be the last field of a message.")
                return start, view[position:]
            position += size
        elif kind == _WIRE_VARINT:
            _, position = _read_varint(view, position)
        elif kind in (_WIRE_FIXED64, _WIRE_FIXED32):
            position += 8 if kind == _WIRE_FIXED64 else 4
        else:
            raise WireError(f"Expected a protobuf message. Received: wire type {kind}.")
    if position != end:
        raise WireError("Expected a whole protobuf message. Received: a part of one.")
    return end, view[end:]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise WireError("Expected a whole protobuf message. Received: a part of one.")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise WireError("Expected a number of at most 64 bits. Received: a longer one.")
