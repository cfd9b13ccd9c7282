"""Slices in memory: the pieces of tensors that they are made of, one after the other."""

from collections.abc import Mapping, Sequence

import numpy as np

from tf_syncdist.propagation import rows
from tf_syncdist.propagation.slices import Slice


def copy_in(part: Slice, flat: Mapping[int, np.ndarray], data: np.ndarray) -> None:
    """Writes a slice of some tensors into bytes."""
    start = 0
    for tensor, first, stop in part.pieces:
        piece = flat[tensor][first:stop].view(np.uint8)
        data[start : start + piece.nbytes] = piece
        start += piece.nbytes


def copy_out(part: Slice, payload: memoryview, flat: Sequence[np.ndarray]) -> None:
    """Writes the bytes of a slice into tensors."""
    data = np.frombuffer(payload, np.uint8)
    start = 0
    for tensor, first, stop in part.pieces:
        piece = flat[tensor][first:stop].view(np.uint8)
        piece[...] = data[start : start + piece.nbytes]
        start += piece.nbytes


def scatter(part: Slice, payload: memoryview, flat: Sequence[np.ndarray]) -> None:
    """Writes rows into the table that has no others."""
    ((tensor, start, stop),) = part.pieces
    table = flat[tensor][start:stop].reshape(-1, part.row_elements)
    table.fill(0)
    data = np.frombuffer(payload, np.uint8)
    found = rows.unpack(data, table.dtype, part.row_elements, len(table))
    table[found.indices] = found.values
