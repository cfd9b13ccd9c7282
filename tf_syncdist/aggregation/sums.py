"""Sums of contributions, in place.

float16 and bfloat16 exist on the wire only: their sums are float32.
"""

import numpy as np

from tf_syncdist.proto import tf_syncdist_pb2 as pb

# What a value is on the wire, and what its sum is.
DTYPES = {
    pb.FLOAT32: (np.dtype("<f4"), np.dtype("<f4")),
    pb.FLOAT64: (np.dtype("<f8"), np.dtype("<f8")),
    pb.INT32: (np.dtype("<i4"), np.dtype("<i4")),
    pb.INT64: (np.dtype("<i8"), np.dtype("<i8")),
    pb.FLOAT16: (np.dtype("<f2"), np.dtype("<f4")),
    # NumPy has no bfloat16.
    pb.BFLOAT16: (np.dtype("<u2"), np.dtype("<f4")),
}

# Narrowing goes over its input several times, so a part of it that stays in the cache at a time.
_CHUNK = 1 << 15


def widen(values: np.ndarray, dtype: int) -> np.ndarray:
    """Returns values as they are summed; the same array unless they were narrowed for the wire.

    Args:
        values: As they come from the wire.
        dtype: Their `DataType`.
    """
    if dtype == pb.BFLOAT16:
        wide = values.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32) if dtype == pb.FLOAT16 else values


def narrow(total: np.ndarray, dtype: int, out: np.ndarray) -> None:
    """Rounds float32 values to the nearest ones of a narrower type, half-way cases to even.

    Args:
        total: The values.
        dtype: `FLOAT16` or `BFLOAT16`.
        out: Where they are written, as they go to the wire.
    """
    for start in range(0, total.size, _CHUNK):
        part = total[start : start + _CHUNK]
        if dtype == pb.FLOAT16:
            with np.errstate(over="ignore", invalid="ignore"):
                out[start : start + _CHUNK] = part
            continue
        bits = part.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        # Rounding could make an infinity of a NaN.
        rounded[np.isnan(part)] = 0x7FC0
        out[start : start + _CHUNK] = rounded


def add(total: np.ndarray, first: np.ndarray | None, values: np.ndarray) -> None:
    """Adds values to a sum.

    Args:
        total: Where the sum is, or is to be.
        first: What has been summed so far; `None` if that is in `total`.
        values: What is added.
    """
    # Several workers may overflow to infinity together; the training program sees the value.
    with np.errstate(over="ignore", invalid="ignore"):
        np.add(total if first is None else first, values, out=total)


def scale(total: np.ndarray, contributions: int, replicas_to_aggregate: int) -> None:
    """Turns a sum into the mean over the contributions, times N.

    With exactly N contributions that is the sum itself, bit for bit.
    """
    if contributions == replicas_to_aggregate:
        return
    factor = replicas_to_aggregate / contributions
    if total.dtype.kind == "i":
        total[...] = np.rint(total * factor)
        return
    with np.errstate(over="ignore", invalid="ignore"):
        total *= total.dtype.type(factor)
