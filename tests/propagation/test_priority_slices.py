"""Slices that carry the priority of their tensor: how tensors are cut for P3."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_syncdist.propagation.slices import (
    ITEM_BYTES,
    Piece,
    Plan,
    TensorSpec,
    plan,
    plan_by_priority,
)

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DENSE = st.builds(TensorSpec, st.sampled_from(sorted(ITEM_BYTES)), SHAPES, st.just(False))
TABLES = st.builds(
    TensorSpec,
    st.sampled_from(["float32", "float16"]),
    st.tuples(st.integers(0, 40), st.integers(1, 6)),
    st.just(True),
)


@st.composite
def models(draw: st.DrawFn, *, tables: bool = True) -> tuple[list[TensorSpec], list[int]]:
    """Returns tensors and, in any order and with ties, when each is used first."""
    specs = draw(st.lists(DENSE | TABLES if tables else DENSE, max_size=10))
    uses = st.lists(st.integers(0, 5), min_size=len(specs), max_size=len(specs))
    return specs, draw(uses)


def forward(way: Plan) -> list:
    """The slices in the order in which the forward pass needs them."""
    return [s for bucket in reversed(way.buckets) for s in bucket.slices]


@settings(max_examples=300, deadline=None)
@given(models(), st.integers(1, 120), st.integers(1, 4))
def test_every_element_is_in_one_slice_of_its_tensors_priority(
    model: tuple[list[TensorSpec], list[int]], slice_elements: int, shards: int
) -> None:
    specs, priorities = model
    way = plan_by_priority(specs, priorities, slice_elements, shards)
    counts = [np.zeros(s.elements, int) for s in specs]
    for bucket in way.buckets:
        # Those that share a slice have the priority of the first of them.
        first = min(priorities[t] for t in bucket.tensors)
        assert {s.priority for s in bucket.slices} <= {first}
        for part in bucket.slices:
            assert part.pieces and part.elements > 0
            assert {p.tensor for p in part.pieces} <= set(bucket.tensors)
            assert {specs[p.tensor].dtype for p in part.pieces} == {part.dtype}
            assert part.elements == sum(stop - start for _, start, stop in part.pieces)
            for tensor, start, stop in part.pieces:
                counts[tensor][start:stop] += 1
    assert all((c == 1).all() for c in counts)
    assert sorted(t for b in way.buckets for t in b.tensors) == list(range(len(specs)))
    found = [s.priority for s in forward(way)]
    assert found == sorted(found), "the first layer's are the most urgent"
    indices = [sorted(s.index for s in way.slices if s.shard == n) for n in range(shards)]
    assert indices == [list(range(n)) for n in way.num_slices]


@settings(max_examples=300, deadline=None)
@given(models(tables=False), st.integers(1, 120), st.integers(1, 4))
def test_slices_have_the_size_that_was_asked_for(
    model: tuple[list[TensorSpec], list[int]], slice_elements: int, shards: int
) -> None:
    specs, priorities = model
    way = plan_by_priority(specs, priorities, slice_elements, shards)
    for bucket in way.buckets:
        sizes = [s.elements for s in bucket.slices]
        assert all(0 < n <= slice_elements for n in sizes)
        # Only the last slice of a tensor is shorter; an exact multiple leaves no empty one.
        assert all(n == slice_elements for n in sizes[:-1])
        assert sum(sizes) == sum(specs[t].elements for t in bucket.tensors)
        if len(bucket.tensors) > 1:
            assert len(sizes) <= 1, "who shares a slice is in no other"
    # Neighbours of one dtype that fit into a slice together are in one.
    order = [b for b in reversed(way.buckets)]
    for before, after in itertools.pairwise(order):
        dtypes = {specs[t].dtype for t in (*before.tensors, *after.tensors)}
        together = sum(specs[t].elements for t in before.tensors)
        together += specs[after.tensors[0]].elements
        assert len(dtypes) > 1 or together > slice_elements


@settings(max_examples=200, deadline=None)
@given(models(), st.integers(1, 60), st.integers(1, 4))
def test_it_is_the_plain_plan_otherwise(
    model: tuple[list[TensorSpec], list[int]], slice_elements: int, shards: int
) -> None:
    """The same fingerprint, so that workers may be summed, and the same bytes on the wire."""
    specs, priorities = model
    way = plan_by_priority(specs, priorities, slice_elements, shards)
    plain = plan(specs, 100, shards)
    assert way.layout == plain.layout and way.specs == plain.specs
    assert sum(s.nbytes for s in way.slices) == sum(s.nbytes for s in plain.slices)
    assert plan_by_priority(specs, priorities, slice_elements, shards) == way
    assert len(way.num_slices) == len(way.nbytes) == shards
    for shard in range(shards):
        mine = [s for s in way.slices if s.shard == shard and not s.row_elements]
        ends = [s.offset + s.nbytes for s in mine]
        # In one buffer of the shard, none lies over another.
        mine.sort(key=lambda s: s.offset)
        assert all(a.offset + a.nbytes <= b.offset for a, b in itertools.pairwise(mine))
        assert max(ends, default=0) <= way.nbytes[shard]
        assert all(s.offset % 64 == 0 for s in mine)


@settings(max_examples=200, deadline=None)
@given(models(), st.integers(1, 60), st.integers(2, 5))
def test_shards_are_even_by_bytes(
    model: tuple[list[TensorSpec], list[int]], slice_elements: int, shards: int
) -> None:
    specs, priorities = model
    way = plan_by_priority(specs, priorities, slice_elements, shards)
    # In a buffer a slice takes whole cache lines.
    room = [[-(-s.nbytes // 64) * 64 for s in way.slices if s.shard == n] for n in range(shards)]
    loads = [sum(sizes) for sizes in room]
    assert max(loads) - min(loads) <= max(map(max, filter(None, room)), default=0)


@pytest.mark.parametrize(
    "elements, expected", [(49, [49]), (50, [50]), (51, [50, 1]), (100, [50, 50]), (0, [])]
)
def test_of_a_tensor_only_the_last_slice_is_shorter(elements: int, expected: list[int]) -> None:
    way = plan_by_priority([TensorSpec("float32", (elements,))], [0], 50, 1)
    assert [s.elements for s in way.slices] == expected
    assert [s.pieces for s in way.slices] == [
        (Piece(0, start, start + size),) for start, size in zip((0, 50), expected, strict=False)
    ]


def test_a_bias_shares_a_slice_with_its_neighbours_of_the_forward_pass() -> None:
    """The variables are not in the order in which the forward pass uses them."""
    specs = [TensorSpec("float32", (n,)) for n in (4, 120, 30, 3, 50)]
    way = plan_by_priority(specs, [3, 0, 1, 1, 2], 50, 1)
    # The last layer first, as backpropagation yields them.
    assert [b.tensors for b in way.buckets] == [(0,), (4,), (2, 3), (1,)]
    assert [[(s.elements, s.priority) for s in b.slices] for b in way.buckets] == [
        [(4, 3)],
        [(50, 2)],
        [(33, 1)],
        [(50, 0), (50, 0), (20, 0)],
    ]


@pytest.mark.parametrize("by_rows", [False, True])
def test_what_has_no_elements_is_in_no_slice_wherever_it_stands(by_rows: bool) -> None:
    empty, full = TensorSpec("float32", (0, 3), by_rows), TensorSpec("float32", (5, 2))
    for specs in ([empty], [empty, full], [full, empty], [empty, empty, full, empty]):
        way = plan_by_priority(specs, range(len(specs)), 10, 2)
        assert sum(s.elements for s in way.slices) == 10 * (full in specs)
        assert sorted(t for b in way.buckets for t in b.tensors) == list(range(len(specs)))


def test_a_table_is_alone_and_cut_between_rows_where_it_is_very_long() -> None:
    table = TensorSpec("float32", (3 * 2**20, 16), True)
    small = TensorSpec("float32", (3,))
    way = plan_by_priority([small, table, small], [0, 1, 2], 50_000, 2)
    assert [b.tensors for b in way.buckets] == [(2,), (1,), (0,)]
    parts = way.buckets[1].slices
    assert [s.row_elements for s in parts] == [16] * 3
    assert all(s.elements % 16 == 0 and s.priority == 1 for s in parts)
    assert [s.nbytes for s in parts] == [64 * 2**20] * 3
    # What travels by rows lies in no buffer.
    assert sum(way.nbytes) == 2 * 64
