"""Cuts the tensors of an exchange into slices and spreads them over shards. Pure."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class TensorSpec(NamedTuple):
    """What is known of one tensor before it has values.

    Args:
        dtype: Name of its dtype.
        shape: Its shape.
        by_rows: Whether most of its rows are zero, and it may travel as the others.
    """

    dtype: str
    shape: tuple[int, ...]
    by_rows: bool = False

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
    """What travels as one message: pieces of tensors of one dtype, one after the other.

    Args:
        shard: The shard that sums it.
        index: Its number among the shard's slices of the exchange.
        dtype: Element type.
        elements: Number of elements.
        offset: Byte at which it begins if all of the shard's slices lie in one buffer.
        pieces: What is in it.
        row_elements: If not 0, the slice is whole rows of so many elements, and may travel as some
            of them.
        priority: When the forward pass uses it first; 0 is the most urgent.
    """

    shard: int
    index: int
    dtype: str
    elements: int
    offset: int
    pieces: tuple[Piece, ...]
    row_elements: int = 0
    priority: int = 0

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.elements * ITEM_BYTES[self.dtype]


class Bucket(NamedTuple):
    """Tensors that are sent together, because they are there at about the same time.

    Args:
        tensors: Their numbers.
        slices: How they are cut.
    """

    tensors: tuple[int, ...]
    slices: tuple[Slice, ...]


class Plan(NamedTuple):
    """All slices of an exchange.

    Args:
        buckets: What is sent, in the order in which backpropagation yields it.
        num_slices: For every shard, how many slices it has.
        nbytes: For every shard, the size of a buffer that holds all of its slices, those of tables
            aside.
        layout: Fingerprint of the tensors; equal on workers that may be summed.
        specs: The tensors.
    """

    buckets: tuple[Bucket, ...]
    num_slices: tuple[int, ...]
    nbytes: tuple[int, ...]
    layout: int
    specs: tuple[TensorSpec, ...]

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of all buckets."""
        return tuple(s for b in self.buckets for s in b.slices)


ITEM_BYTES = {"float32": 4, "float64": 8, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2}

# Slices in one buffer begin at whole cache lines.
_ALIGNMENT = 64

_BUCKETS_BY_WORKERS_SQUARED = 3
_LEAST_BYTES_ON_THEIR_WAY = 12 * 2**20
_LEAST_BUCKET_BYTES, _MOST_LEAST_BYTES = 2**20, 4 * 2**20
_MOST_BUCKET_BYTES = 16 * 2**20

# Rows of a table are cut only where the whole table would be too long for a message.
_TABLE_BYTES = 64 * 2**20


def layout_of(items: Sequence[object]) -> int:
    """Returns a 64-bit fingerprint of a list of specs; the same in every process."""
    text = "\n".join(map(str, items)).replace(", by_rows=False", "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fitting_bucket_bytes(specs: Sequence[TensorSpec], num_workers: int) -> int:
    """Returns a good size for buckets: several for what is large, but no small ones.

    A slice costs about half a millisecond of all processes together, whatever its size; and a dozen
    of them keep two workers busy. With many workers they are smaller, because the service has some
    ten slices of each worker on their way, and is to need three times the model's bytes at most.
    """
    total = sum(s.elements * ITEM_BYTES[s.dtype] for s in specs if not s.by_rows)
    least = max(_LEAST_BYTES_ON_THEIR_WAY // num_workers, _LEAST_BUCKET_BYTES)
    least = min(least, _MOST_LEAST_BYTES)
    fitting = max(total // (_BUCKETS_BY_WORKERS_SQUARED * num_workers**2), least)
    return min(fitting, _MOST_BUCKET_BYTES)


def plan(
    specs: Sequence[TensorSpec], bucket_bytes: int | None, num_shards: int, num_workers: int = 2
) -> Plan:
    """Fuses small tensors into buckets, cuts large ones, and spreads the slices over shards.

    Args:
        specs: The tensors of the exchange, in the order in which the forward pass uses them.
        bucket_bytes: Tensors share a bucket until it has this many bytes; a larger one is cut into
            slices of at most this size. By default `fitting_bucket_bytes`.
        num_shards: Over how many shards the slices are spread, evenly by bytes.
        num_workers: How many workers send them.

    Returns:
        A `Plan`. Tensors without elements are in no slice.
    """
    if bucket_bytes is None:
        bucket_bytes = fitting_bucket_bytes(specs, num_workers)
    spread = _Spread(num_shards)
    buckets = []
    for dtype, tensors in _fused(specs, bucket_bytes):
        row = _row_elements(specs[tensors[0]])
        most = max(1, bucket_bytes // ITEM_BYTES[dtype])
        if row:
            most = max(1, _TABLE_BYTES // (row * ITEM_BYTES[dtype])) * row
        cut = _cut([(t, specs[t].elements) for t in tensors], most, row or 1)
        buckets.append(Bucket(tuple(tensors), spread.add(cut, dtype, row)))
    return spread.plan(buckets, specs)


def plan_by_priority(
    specs: Sequence[TensorSpec],
    priorities: Sequence[int],
    slice_elements: int,
    num_shards: int,
) -> Plan:
    """Cuts tensors into slices that carry the priority of their tensor (P3, section 4.1).

    Neighbours that fit into one slice together share it, with the priority of the first of them: a
    message of its own for each bias would cost more than it gains. Of a larger tensor every slice
    but the last has `slice_elements`, and that one is never empty.

    Args:
        specs: The tensors of the exchange.
        priorities: For each tensor, when the forward pass uses it first, from 0.
        slice_elements: How many elements a slice has at most; of a table that travels by rows, the
            rows that begin within.
        num_shards: Over how many shards the slices are spread, evenly by bytes.

    Returns:
        A `Plan`. The buckets are in the order of backpropagation, the last layer first.
    """
    order = sorted(range(len(specs)), key=lambda t: (priorities[t], t))
    shared: list[tuple[str, int, list[int]]] = []
    # Below 0 not even a tensor without elements fits in.
    room = -1
    for tensor in order:
        spec = specs[tensor]
        fits = spec.elements <= room and not spec.by_rows and spec.dtype == shared[-1][0]
        if fits:
            shared[-1][2].append(tensor)
            room -= spec.elements
        else:
            shared.append((spec.dtype, priorities[tensor], [tensor]))
            room = -1 if spec.by_rows else slice_elements - spec.elements
    spread = _Spread(num_shards)
    buckets = []
    for dtype, priority, tensors in shared:
        row = _row_elements(specs[tensors[0]])
        if len(tensors) > 1:
            cut = [tuple(Piece(t, 0, specs[t].elements) for t in tensors if specs[t].elements)]
            cut = [pieces for pieces in cut if pieces]
        else:
            most = slice_elements
            if row:
                # Nobody knows how few of its rows there will be, so only a long table is cut.
                most = max(1, _TABLE_BYTES // (row * ITEM_BYTES[dtype])) * row
            elements = specs[tensors[0]].elements
            cut = [
                (Piece(tensors[0], start, min(start + most, elements)),)
                for start in range(0, elements, most)
            ]
        buckets.append(Bucket(tuple(tensors), spread.add(cut, dtype, row, priority)))
    return spread.plan(reversed(buckets), specs)


class _Spread:
    """Spreads slices over shards, evenly by bytes."""

    def __init__(self, num_shards: int) -> None:
        self._loads = [0] * num_shards
        self._ends = [0] * num_shards
        self._counts = [0] * num_shards

    def add(
        self, cut: Iterable[tuple[Piece, ...]], dtype: str, row: int, priority: int = 0
    ) -> tuple[Slice, ...]:
        """Returns slices of these pieces, each on the shard that has least."""
        slices = []
        for pieces in cut:
            shard = self._loads.index(min(self._loads))
            elements = sum(p.stop - p.start for p in pieces)
            index, end = self._counts[shard], self._ends[shard]
            slices.append(Slice(shard, index, dtype, elements, end, pieces, row, priority))
            nbytes = -(-elements * ITEM_BYTES[dtype] // _ALIGNMENT) * _ALIGNMENT
            self._loads[shard] += nbytes
            self._ends[shard] += 0 if row else nbytes
            self._counts[shard] += 1
        return tuple(slices)

    def plan(self, buckets: Iterable[Bucket], specs: Sequence[TensorSpec]) -> Plan:
        """Returns the plan of all that was added."""
        return Plan(
            tuple(buckets), tuple(self._counts), tuple(self._ends), layout_of(specs), tuple(specs)
        )


def _row_elements(spec: TensorSpec) -> int:
    """Returns how many elements a row has of a tensor that may travel by rows, else 0."""
    return spec.elements // spec.shape[0] if spec.by_rows and spec.elements else 0


def _fused(specs: Sequence[TensorSpec], bucket_bytes: int) -> list[tuple[str, list[int]]]:
    """Returns the tensors of each bucket, those first that backpropagation yields first."""
    done, open_ = [], {}
    for number in reversed(range(len(specs))):
        dtype = specs[number].dtype
        if specs[number].by_rows:
            done.append((dtype, [number]))
            continue
        tensors, size = open_.get(dtype, ([], 0))
        tensors.append(number)
        size += specs[number].elements * ITEM_BYTES[dtype]
        open_[dtype] = (tensors, size)
        if size >= bucket_bytes:
            done.append((dtype, tensors))
            del open_[dtype]
    return done + [(dtype, tensors) for dtype, (tensors, _) in open_.items()]


def _cut(tensors: Sequence[tuple[int, int]], most: int, unit: int) -> list[tuple[Piece, ...]]:
    """Cuts tensors into slices of about the same size.

    Args:
        tensors: Number and elements of each.
        most: How many elements a slice has at most.
        unit: Slices have a multiple of so many elements.
    """
    total = sum(elements for _, elements in tensors)
    num_slices = -(-total // most)
    slices: list[tuple[Piece, ...]] = []
    pieces: list[Piece] = []
    taken = 0
    for number, elements in tensors:
        start = 0
        while start < elements:
            end = (len(slices) + 1) * (total // unit) // num_slices * unit
            stop = min(elements, start + end - taken)
            pieces.append(Piece(number, start, stop))
            taken += stop - start
            start = stop
            if taken == end:
                slices.append(tuple(pieces))
                pieces = []
    return slices
