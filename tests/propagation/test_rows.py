"""Tables of which few rows are not zero."""

import numpy as np
import pytest

from tf_syncdist.propagation import rows
from tf_syncdist.propagation.rows import Rows


def table_of(some: Rows, num_rows: int) -> np.ndarray:
    """Adds up rows one by one."""
    table = np.zeros((num_rows, some.values.shape[1]), some.values.dtype)
    for index, value in zip(some.indices, some.values, strict=True):
        table[index] += value
    return table


def random_rows(seed: int, num_rows: int, count: int, width: int = 3) -> Rows:
    """Rows with duplicates; all sums of them are exact."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-1000, 1000, (count, width)).astype("f4")
    return Rows(rng.integers(0, num_rows, count), values)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("num_rows", [1, 5, 1000])
def test_duplicates_are_added_up(num_rows: int, count: int) -> None:
    some = random_rows(count, num_rows, count)
    once = rows.unique(some)
    assert np.all(np.diff(once.indices) > 0)
    np.testing.assert_array_equal(rows.dense(once, num_rows), table_of(some, num_rows))


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_table_in_two_parts(count: int) -> None:
    once = rows.unique(random_rows(1, 20, count))
    parts = [rows.between(once, 0, 8), rows.between(once, 8, 20)]
    both = np.concatenate([rows.dense(parts[0], 8), rows.dense(parts[1], 12)])
    np.testing.assert_array_equal(both, rows.dense(once, 20))


@pytest.mark.parametrize("count", [0, 1, 40])
def test_what_is_packed_can_be_unpacked(count: int) -> None:
    once = rows.unique(random_rows(2, 50, count))
    data = np.concatenate(rows.pack(once))
    assert data.nbytes == once.nbytes
    again = rows.unpack(data, np.dtype("<f4"), 3, 50)
    np.testing.assert_array_equal(again.indices, once.indices)
    np.testing.assert_array_equal(again.values, once.values)


@pytest.mark.parametrize(
    "indices", [[1, 1], [2, 1], [-1], [50], [2**62], [-(2**63)], list(range(51))]
)
def test_rows_that_cannot_be_are_refused(indices: list[int]) -> None:
    values = np.zeros((len(indices), 3), "f4")
    data = np.concatenate(rows.pack(Rows(np.array(indices), values)))
    with pytest.raises(ValueError, match="Expected"):
        rows.unpack(data, np.dtype("<f4"), 3, 50)
    with pytest.raises(ValueError, match="Expected"):
        rows.unpack(data[:-1], np.dtype("<f4"), 3, 50)


@pytest.mark.parametrize("counts", [(1,), (0, 0), (2, 3, 1), (0, 40), (60, 60, 60)])
def test_sums_are_rows_or_the_whole_table_whichever_is_smaller(counts: tuple[int, ...]) -> None:
    parts = [rows.unique(random_rows(i, 50, n)) for i, n in enumerate(counts)]
    total = rows.add(parts, 50)
    expected = sum(rows.dense(p, 50) for p in parts)
    whole = not isinstance(total, Rows)
    np.testing.assert_array_equal(total if whole else rows.dense(total, 50), expected)
    touched = len(np.unique(np.concatenate([p.indices for p in parts])))
    assert whole == (touched * (8 + 12) >= 50 * 12)
