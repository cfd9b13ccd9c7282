"""Cutting tensors into slices and spreading them over shards."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tf_syncdist.propagation import slices
from tf_syncdist.propagation.slices import (
    Piece,
    Plan,
    Slice,
    TensorSpec,
    fitting_bucket_bytes,
    layout_of,
    plan,
)

DTYPES = ["float32", "float64", "int32", "int64"]


def random_specs(rng: random.Random) -> list[TensorSpec]:
    """A model of up to 12 tensors of 0 to 4 dimensions; some are scalars, some are empty."""
    dtypes = rng.sample(DTYPES, rng.randint(1, 4))
    return [
        TensorSpec(
            rng.choice(dtypes), tuple(rng.choice([0, 1, 2, 3, 9]) for _ in range(rng.randint(0, 4)))
        )
        for _ in range(rng.randint(0, 12))
    ]


def covered(way: Plan, specs: list[TensorSpec]) -> list[np.ndarray]:
    """Returns, for every element, how often it is in a slice."""
    counts = [np.zeros(s.elements, int) for s in specs]
    for part in way.slices:
        for tensor, start, stop in part.pieces:
            assert 0 <= start < stop <= specs[tensor].elements
            counts[tensor][start:stop] += 1
    return counts


@pytest.mark.parametrize("seed", range(100))
def test_random_plans(seed: int) -> None:
    """Each element is in one slice; slices are bounded, of one dtype, and balanced over shards."""
    rng = random.Random(seed)
    specs, shards = random_specs(rng), rng.randint(1, 5)
    limit = rng.choice([8, 12, 40, 100, 1000, 10**6])
    way = plan(specs, limit, shards)
    assert all((c == 1).all() for c in covered(way, specs))
    size_of = {d: np.dtype(d).itemsize for d in DTYPES}
    loads = [0] * shards
    indices: list[list[int]] = [[] for _ in range(shards)]
    for part in way.slices:
        size = part.elements * size_of[part.dtype]
        assert size == part.nbytes
        assert 0 < size <= limit
        assert part.elements == sum(stop - start for _, start, stop in part.pieces)
        assert {specs[p.tensor].dtype for p in part.pieces} == {part.dtype}
        # In one buffer of the shard, slices lie one after the other.
        assert loads[part.shard] <= part.offset < loads[part.shard] + 64
        assert part.offset % 64 == 0
        loads[part.shard] = part.offset + size
        indices[part.shard].append(part.index)
    assert indices == [list(range(n)) for n in way.num_slices]
    assert all(load <= n < load + 64 for load, n in zip(loads, way.nbytes, strict=True))
    assert max(way.nbytes) - min(way.nbytes) <= limit + 64
    assert plan(specs, limit, shards) == way
    # Every tensor is in one bucket, the last ones first, and small ones share one.
    sent = [t for bucket in way.buckets for t in bucket.tensors]
    assert sorted(sent) == list(range(len(specs)))
    for dtype in DTYPES:
        mine = [b.tensors for b in way.buckets if specs[b.tensors[0]].dtype == dtype]
        assert [t for tensors in mine for t in tensors] == [
            t for t in reversed(range(len(specs))) if specs[t].dtype == dtype
        ]
        full = [sum(specs[t].elements for t in tensors) * size_of[dtype] for tensors in mine]
        assert all(n >= limit for n in full[:-1])
        for tensors in mine:
            assert sum(specs[t].elements for t in tensors[:-1]) * size_of[dtype] < limit
    # No more slices than needed, all of about the same size.
    for bucket in way.buckets:
        elements = [s.elements for s in bucket.slices]
        most = limit // size_of[specs[bucket.tensors[0]].dtype]
        assert len(elements) == -(-sum(elements) // most)
        assert not elements or max(elements) - min(elements) <= 1


def test_buckets_are_filled_from_the_last_tensor() -> None:
    specs = [TensorSpec("float32", (n,)) for n in (1, 12, 2, 3, 4)]
    assert [b.tensors for b in plan(specs, 24, 2).buckets] == [(4, 3), (2, 1), (0,)]
    assert plan(specs, 24, 2).slices == (
        Slice(0, 0, "float32", 3, 0, (Piece(4, 0, 3),)),
        Slice(1, 0, "float32", 4, 0, (Piece(4, 3, 4), Piece(3, 0, 3))),
        Slice(0, 1, "float32", 4, 64, (Piece(2, 0, 2), Piece(1, 0, 2))),
        Slice(1, 1, "float32", 5, 64, (Piece(1, 2, 7),)),
        Slice(0, 2, "float32", 5, 128, (Piece(1, 7, 12),)),
        Slice(1, 2, "float32", 1, 128, (Piece(0, 0, 1),)),
    )


def test_no_tensors_and_empty_tensors_have_no_slices() -> None:
    for specs in ([], [TensorSpec("float32", (0,)), TensorSpec("int64", (3, 0))]):
        way = plan(specs, 100, 3)
        assert way.slices == () and way.num_slices == (0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_limit_below_one_element_still_moves_one_element_at_a_time(dtype: str) -> None:
    way = plan([TensorSpec(dtype, (3,))], 1, 1)
    assert [p.elements for p in way.slices] == [1, 1, 1]


@pytest.mark.parametrize("shape, elements", [((), 1), ((0,), 0), ((3,), 3), ((2, 3, 4), 24)])
def test_elements_of_a_spec(shape: tuple[int, ...], elements: int) -> None:
    assert TensorSpec("float32", shape).elements == elements


def test_a_large_model_is_spread_evenly() -> None:
    specs = [TensorSpec("float32", (2**21,)), TensorSpec("float32", (17,))]
    way = plan(specs, 2**20, 3)
    assert len(way.slices) == 9 and way.num_slices == (3, 3, 3)


@pytest.mark.parametrize(
    "megabytes, workers, expected",
    [
        (0, 2, 4 * 2**20),
        (100, 2, 100_000_000 // 12),
        (100, 3, 4 * 2**20),
        (400, 3, 400_000_000 // 27),
        (400, 4, 400_000_000 // 48),
        (100, 6, 2 * 2**20),
        (100, 100, 2**20),
        (10_000, 2, 16 * 2**20),
    ],
)
def test_buckets_are_smaller_the_more_workers_there_are(
    megabytes: int, workers: int, expected: int
) -> None:
    specs = [TensorSpec("float32", (250_000 * megabytes,)), TensorSpec("float32", (3,), True)]
    assert fitting_bucket_bytes(specs, workers) == expected
    # What is on its way: ten slices of each worker, at most twice the model or what is little.
    assert 10 * workers * expected <= max(2.0 * megabytes * 1e6, 130 * 2**20, workers * 10 * 2**20)


MODEL = [TensorSpec("float32", (3, 2)), TensorSpec("int64", ())]


def test_the_layout_is_the_same_in_every_process_and_version() -> None:
    """A hard-coded value: workers of different processes and Pythons compare it."""
    assert plan(MODEL, 100, 1).layout == layout_of(MODEL) == 13506200825769902807
    code = (
        "from tf_syncdist.propagation.slices import TensorSpec, layout_of\n"
        "print(layout_of([TensorSpec('float32', (3, 2)), TensorSpec('int64', ())]))"
    )
    root = Path(slices.__file__).parents[2]
    env = {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, timeout=60, check=True
    )
    assert int(result.stdout) == layout_of(MODEL)


def test_the_layout_does_not_depend_on_how_the_exchange_is_cut() -> None:
    assert len({plan(MODEL, size, shards).layout for size in (8, 99) for shards in (1, 4)}) == 1


def test_layouts_of_different_tensors_differ() -> None:
    models = [
        [],
        MODEL,
        MODEL[:1],
        MODEL[::-1],
        [*MODEL, TensorSpec("float32", (0,))],
        [TensorSpec("float32", (2, 3)), MODEL[1]],
        [TensorSpec("float32", (6,)), MODEL[1]],
        [TensorSpec("float64", (3, 2)), MODEL[1]],
        [MODEL[0], TensorSpec("int64", (1,))],
    ]
    layouts = {layout_of(m) for m in models}
    assert len(layouts) == len(models)
    assert all(0 <= layout < 2**64 for layout in layouts)
