"""Cutting tensors into slices and spreading them over shards."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tf_syncdist.propagation import slices
from tf_syncdist.propagation.slices import Piece, Plan, Slice, TensorSpec, layout_of, plan

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
        assert 0 < size <= limit
        assert part.elements == sum(stop - start for _, start, stop in part.pieces)
        assert {specs[p.tensor].dtype for p in part.pieces} == {part.dtype}
        loads[part.shard] += size
        indices[part.shard].append(part.index)
    assert indices == [list(range(n)) for n in way.num_slices]
    assert max(loads) - min(loads) <= limit
    assert plan(specs, limit, shards) == way
    # No more slices than needed, so that small tensors share messages.
    bytes_of = {d: sum(s.elements for s in specs if s.dtype == d) * size_of[d] for d in DTYPES}
    needed = sum(-(-n // (limit // size_of[d] * size_of[d])) for d, n in bytes_of.items())
    assert len(way.slices) == needed


def test_elements_stay_in_order_within_a_slice() -> None:
    specs = [TensorSpec("float32", (3,)), TensorSpec("int32", ()), TensorSpec("float32", (2, 2))]
    assert plan(specs, 20, 2).slices == (
        Slice(0, 0, "float32", 5, (Piece(0, 0, 3), Piece(2, 0, 2))),
        Slice(1, 0, "float32", 2, (Piece(2, 2, 4),)),
        Slice(1, 1, "int32", 1, (Piece(1, 0, 1),)),
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
