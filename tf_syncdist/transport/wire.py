"""Messages of the contract as bytes, with the payload outside of protobuf objects.

A message is the ordinary serialization of its header followed by field 15, the payload. Writing
it by hand spares two copies of the bulk data on each side, and the bytes remain valid protobuf.
"""

import ctypes
from typing import Generic, TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.proto import tf_syncdist_peers_pb2 as peers_pb

PROTOCOL = 7
SERVICE = "tf_syncdist.v1.Aggregation"
TRAIN = f"/{SERVICE}/Train"
REPORT = f"/{SERVICE}/Report"
BEAT = f"/{SERVICE}/Beat"
PEERS = "tf_syncdist.v1.Peers"
GREET = f"/{PEERS}/Greet"
PULL = f"/{PEERS}/Pull"
PUSH = f"/{PEERS}/Push"

# Slices and states are cut to 1 MiB by the worker; metrics and batch-norm statistics, once per
# epoch, are one message. Nothing legitimate is larger than this.
MAX_MESSAGE_BYTES = 256 * 2**20

# Protobuf objects need far more memory than their bytes, so these are few: enough for the
# manifest or the hashes of ten thousands of variables, and what the service adds to a worker's.
_MAX_HEADER_BYTES = {
    pb.ToAggregator: 4 * 2**20,
    pb.ToWorker: 8 * 2**20,
    peers_pb.ToPeer: 2**16,
    peers_pb.FromPeer: 2**16,
}
_MAX_FIELDS = 1000

# What a worker sends at most, so that the service can send it on in one message.
MAX_PAYLOAD_BYTES = MAX_MESSAGE_BYTES - _MAX_HEADER_BYTES[pb.ToWorker]

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A reconnecting client must not sit out gRPC's two-minute backoff.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Nor wait for twenty seconds for an address that does not answer at all.
    ("grpc.min_reconnect_backoff_ms", 1000),
    # Otherwise a new connection to an address shares the broken one of the old.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # The largest frame that HTTP/2 knows. By default a message of some megabytes is hundreds of
    # frames, each a buffer of its own until the last one has come.
    ("grpc.http2.max_frame_size", 2**24 - 1),
)

_PAYLOAD_TAG = bytes([15 << 3 | 2])
# Field 17 with a length of two bytes; the least padding.
_PADDING_TAG = bytes([(17 << 3 | 2) & 0x7F | 0x80, 17 >> 4])
_LEAST_PADDING = 4
_MOST_PADDING = _LEAST_PADDING + (1 << 14) - 1
_WIRE_VARINT, _WIRE_FIXED64, _WIRE_LENGTH, _WIRE_FIXED32 = 0, 1, 2, 5

Message = TypeVar("Message", pb.ToAggregator, pb.ToWorker, peers_pb.ToPeer, peers_pb.FromPeer)

# The one way to make a bytes object that is filled afterwards.
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)


class WireError(ValueError):
    """Bytes that are no message of the contract."""


def encode(header: Message, *pieces: bytes | memoryview) -> bytes:
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


class Frame(Generic[Message]):
    """A message whose payload is written in place, before its header is known.

    gRPC takes nothing but `bytes`, and joining them would be one more copy of every payload. So
    the bytes object is made first and filled afterwards, as C extensions do; nobody else has seen
    it until `seal` returns it.

    Args:
        nbytes: Size of the payload.
        head_bytes: Room for the header.

    Attributes:
        payload: The payload as a writable array of uint8, aligned to 16 bytes.
    """

    def __init__(self, nbytes: int, head_bytes: int = 128) -> None:
        self._end = _PAYLOAD_TAG + _varint(nbytes)
        self._head_bytes = (head_bytes + len(self._end) + _LEAST_PADDING + 15) // 16 * 16
        self._message = _new_bytes(None, self._head_bytes + nbytes)
        self._memory = np.asarray(_Writable(self._message))
        self.payload = self._memory[self._head_bytes :]

    def seal(self, header: Message) -> bytes:
        """Writes the header and returns the message. The payload must not be written any more."""
        head = header.SerializeToString()
        padding = self._head_bytes - len(head) - len(self._end)
        if not _LEAST_PADDING <= padding <= _MOST_PADDING:
            raise WireError(
                f"Expected a header of at most {self._head_bytes - len(self._end)} bytes. "
                f"Received: {len(head)} bytes."
            )
        zeros = padding - _LEAST_PADDING
        length = bytes([zeros & 0x7F | 0x80, zeros >> 7])
        head = b"".join((head, _PADDING_TAG, length, bytes(zeros), self._end))
        self._memory[: self._head_bytes] = np.frombuffer(head, np.uint8)
        return self._message


class _Writable:
    """Lets NumPy write into a bytes object, and keeps it alive meanwhile."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (len(message),),
            "data": (id(message) + bytes.__basicsize__ - 1, False),
        }


def decode(cls: type[Message], data: bytes) -> tuple[Message, memoryview]:
    """Returns the header and a view of the payload of a message.

    Args:
        cls: `ToAggregator`, `ToWorker`, `ToPeer` or `FromPeer`.
        data: The bytes of the message.

    Raises:
        WireError: If the bytes are no such message, or the payload is not its last field.
    """
    view = memoryview(data)
    start, payload = _find_payload(view)
    if start > _MAX_HEADER_BYTES[cls]:
        raise WireError(
            f"Expected a {cls.__name__} message with at most {_MAX_HEADER_BYTES[cls]} bytes "
            f"besides the payload. Received: {start} bytes."
        )
    if cls is pb.ToAggregator and payload.nbytes > MAX_PAYLOAD_BYTES:
        raise WireError(
            f"Expected a payload of at most {MAX_PAYLOAD_BYTES} bytes. Received: "
            f"{payload.nbytes} bytes."
        )
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
    fields = 0
    while position < end:
        fields += 1
        if fields > _MAX_FIELDS:
            raise WireError(f"Expected at most {_MAX_FIELDS} fields. Received: more of them.")
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
