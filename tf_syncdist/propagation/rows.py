"""Tables of which few rows are not zero, as the gradients of embeddings are. Pure.

On the wire such a slice is the numbers of its rows as int64, each once and in ascending order,
then the rows themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_INDEX_BYTES = 8


class Rows(NamedTuple):
    """Some rows of a table.

    Args:
        indices: Numbers of the rows, int64. Unless it is said otherwise, a row may come twice.
        values: The rows: an array of two dimensions.
    """

    indices: np.ndarray
    values: np.ndarray

    @property
    def nbytes(self) -> int:
        """Number of bytes on the wire."""
        return self.indices.size * _INDEX_BYTES + self.values.nbytes


def unique(rows: Rows) -> Rows:
    """Returns rows in ascending order, those that come several times added up."""
    order = np.argsort(rows.indices, kind="stable")
    indices, values = rows.indices[order], rows.values[order]
    starts = np.flatnonzero(np.diff(indices, prepend=indices[:1] - 1))
    if starts.size < indices.size:
        values = np.add.reduceat(values, starts, axis=0)
    return Rows(indices[starts], values)


def between(rows: Rows, start: int, stop: int) -> Rows:
    """Returns the rows from `start` to below `stop`, numbered from `start`.

    Args:
        rows: Rows in ascending order.
        start: The first row.
        stop: The row after the last one.
    """
    first, last = np.searchsorted(rows.indices, (start, stop))
    return Rows(rows.indices[first:last] - start, rows.values[first:last])


def dense(rows: Rows, num_rows: int) -> np.ndarray:
    """Returns all rows of a table of which these, each once, are not zero."""
    table = np.zeros((num_rows, rows.values.shape[1]), rows.values.dtype)
    table[rows.indices] = rows.values
    return table


def pack(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of rows as they go to the wire, in two pieces."""
    indices = np.ascontiguousarray(rows.indices, "<i8")
    return indices.view(np.uint8), np.ascontiguousarray(rows.values).reshape(-1).view(np.uint8)


def unpack(data: np.ndarray, dtype: np.dtype, row_elements: int, num_rows: int) -> Rows:
    """Returns what `pack` has made.

    Args:
        data: Bytes.
        dtype: Of the values.
        row_elements: How many elements a row has.
        num_rows: How many rows the whole slice has.

    Raises:
        ValueError: If these are no rows of such a slice.
    """
    size = _INDEX_BYTES + row_elements * dtype.itemsize
    count, rest = divmod(data.nbytes, size)
    if rest or count > num_rows:
        raise ValueError(
            f"Expected at most {num_rows} rows of {size} bytes. Received: {data.nbytes} bytes."
        )
    split = count * _INDEX_BYTES
    indices = np.frombuffer(data[:split], "<i8")
    in_order = bool(np.all(indices[1:] > indices[:-1]))
    if not in_order or (count and not 0 <= indices[0] <= indices[-1] < num_rows):
        raise ValueError(
            f"Expected numbers of rows from 0 to {num_rows - 1} in ascending order. Received: "
            f"{count} others."
        )
    values = np.frombuffer(data[split:], dtype).reshape(count, row_elements)
    return Rows(indices, values)


def add(parts: Sequence[Rows], num_rows: int) -> Rows | np.ndarray:
    """Adds up tables, in their order.

    Args:
        parts: The tables, each with every row once; at least one.
        num_rows: How many rows the whole table has.

    Returns:
        Rows in ascending order, or the whole table if that is smaller.
    """
    first = parts[0].values
    where = np.unique(np.concatenate([p.indices for p in parts]))
    row_bytes = first.shape[1] * first.itemsize
    whole = where.size * (_INDEX_BYTES + row_bytes) >= num_rows * row_bytes
    total = np.zeros((num_rows if whole else where.size, first.shape[1]), first.dtype)
    for part in parts:
        at = part.indices if whole else np.searchsorted(where, part.indices)
        # Several workers may overflow to infinity together; the training program sees the value.
        with np.errstate(over="ignore", invalid="ignore"):
            total[at] += part.values
    return total if whole else Rows(where, total)
