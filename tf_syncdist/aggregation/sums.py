"""Sums of contributions, in place."""

import numpy as np

from tf_syncdist.proto import tf_syncdist_pb2 as pb

DTYPES = {
    pb.FLOAT32: np.dtype("<f4"),
    pb.FLOAT64: np.dtype("<f8"),
    pb.INT32: np.dtype("<i4"),
    pb.INT64: np.dtype("<i8"),
}


def add(total: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """Adds a contribution to a sum; the first one is copied, since it belongs to a message."""
    if total is None:
        return values.copy()
    # Several workers may overflow to infinity together; the training program sees the value.
    with np.errstate(over="ignore", invalid="ignore"):
        np.add(total, values, out=total)
    return total


def scale(total: np.ndarray, contributions: int, replicas_to_aggregate: int) -> np.ndarray:
    """Turns a sum into the mean over the contributions, times N.

    With exactly N contributions that is the sum itself, bit for bit.
    """
    if contributions == replicas_to_aggregate:
        return total
    factor = replicas_to_aggregate / contributions
    if total.dtype.kind == "i":
        return np.rint(total * factor).astype(total.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        total *= total.dtype.type(factor)
    return total
