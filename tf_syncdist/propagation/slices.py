"""Cuts the tensors of an exchange into slices and spreads them over shards. Pure."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class TensorSpec(NamedTuple):
    """Dtype name and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n


class Piece(NamedTuple):
    """Elements `start` to `stop` of the flattened tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


class Slice(NamedTuple):
    """What travels as one message: pieces of tensors of one dtype, one after the other."""

    shard: int
    index: int
    dtype: str
    elements: int
    pieces: tuple[Piece, ...]


class Plan(NamedTuple):
    """All slices of an exchange.

    Args:
        slices: The slices, in the order in which they are to be sent.
        num_slices: For every shard, how many slices it has.
        layout: Fingerprint of the tensors; equal on workers that may be summed.
    """

    slices: tuple[Slice, ...]
    num_slices: tuple[int, ...]
    layout: int


_ITEM_BYTES = {"float32": 4, "float64": 8, "int32": 4, "int64": 8}


def layout_of(items: Sequence[object]) -> int:
    """Returns a 64-bit fingerprint of a list of specs; the same in every process."""
    text = "\n".join(map(str, items))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def plan(specs: Sequence[TensorSpec], slice_bytes: int, num_shards: int) -> Plan:
    """Cuts tensors into slices of at most `slice_bytes`, small tensors sharing one.

    Args:
        specs: The tensors of the exchange.
        slice_bytes: Upper bound for the payload of a slice, in bytes.
        num_shards: Over how many shards the slices are spread, evenly by bytes.

    Returns:
        A `Plan`. Tensors without elements are in no slice.
    """
    groups: list[tuple[str, list[Piece]]] = []
    for dtype in dict.fromkeys(s.dtype for s in specs):
        capacity = max(1, slice_bytes // _ITEM_BYTES[dtype])
        pieces: list[Piece] = []
        free = capacity
        for number, spec in enumerate(specs):
            start = 0
            while spec.dtype == dtype and start < spec.elements:
                stop = min(spec.elements, start + free)
                pieces.append(Piece(number, start, stop))
                free -= stop - start
                start = stop
                if not free:
                    groups.append((dtype, pieces))
                    pieces, free = [], capacity
        if pieces:
            groups.append((dtype, pieces))
    loads = [0] * num_shards
    counts = [0] * num_shards
    slices = []
    for dtype, pieces in groups:
        shard = loads.index(min(loads))
        elements = sum(p.stop - p.start for p in pieces)
        slices.append(Slice(shard, counts[shard], dtype, elements, tuple(pieces)))
        loads[shard] += elements * _ITEM_BYTES[dtype]
        counts[shard] += 1
    return Plan(tuple(slices), tuple(counts), layout_of(specs))
