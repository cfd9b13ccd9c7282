"""Memory for the results of exchanges, used again once TensorFlow has forgotten them.

TensorFlow takes an array without a copy if it begins at a whole cache line. Fresh memory costs as
much as a copy: the system clears it page by page at the first use.
"""

import sys
from collections.abc import Sequence

import numpy as np

from tf_syncdist.propagation.slices import TensorSpec

_ALIGNMENT = 64
_MOST_BLOCKS = 8


class Buffers:
    """Lends memory for lists of arrays."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        # References that an unused block has while `_is_unused` looks at it.
        probe = [np.empty(0, np.uint8)]
        self._unused = next(sys.getrefcount(block) for block in probe)

    def take(self, specs: Sequence[TensorSpec]) -> list[np.ndarray]:
        """Returns one uninitialised array per spec, contiguous and aligned."""
        sizes = [np.dtype(s.dtype).itemsize * s.elements for s in specs]
        starts = np.cumsum([0, *(-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes)]).tolist()
        block = self._block(starts[-1])
        skip = -block.ctypes.data % _ALIGNMENT
        return [
            block[skip + start : skip + start + size].view(spec.dtype).reshape(spec.shape)
            for start, size, spec in zip(starts, sizes, specs, strict=False)
        ]

    def _block(self, nbytes: int) -> np.ndarray:
        size = nbytes + _ALIGNMENT
        for block in self._blocks:
            # A view of a block, whoever holds it, refers to the block itself.
            if block.nbytes == size and sys.getrefcount(block) == self._unused:
                return block
        block = np.empty(size, np.uint8)
        self._blocks = [*self._blocks[1 - _MOST_BLOCKS :], block]
        return block
