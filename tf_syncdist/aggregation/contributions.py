"""The values of a contribution, read where they are."""

import numpy as np

from tf_syncdist.aggregation import sums
from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.memory import WorkerMemory
from tf_syncdist.propagation import rows
from tf_syncdist.propagation.rows import Rows
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire


def read(
    message: pb.Contribution, payload: memoryview, memory: WorkerMemory | None, worker: int
) -> np.ndarray | Rows:
    """Returns the values of a contribution as they were sent, without copying them.

    Args:
        message: The contribution.
        payload: What came with it.
        memory: The worker's memory that the service can read.
        worker: Index of the worker.

    Raises:
        Refused: If there are no such values.
    """
    dtype, _ = sums.DTYPES.get(message.dtype, (None, None))
    data: np.ndarray | None = np.frombuffer(payload, np.uint8)
    in_memory = message.HasField("location")
    where = f"for slice {message.slice} of run {message.run} from worker {worker}"
    if dtype is not None and in_memory:
        nbytes = message.elements * dtype.itemsize
        data = memory.read(message.location, nbytes) if memory is not None else None
        if data is not None and data.nbytes > wire.MAX_PAYLOAD_BYTES:
            raise invalid(
                f"Expected a slice of at most {wire.MAX_PAYLOAD_BYTES} bytes. Received: "
                f"{data.nbytes} bytes {where}."
            )
    if dtype is not None and message.row_elements:
        num_rows, rest = divmod(message.elements, message.row_elements)
        if rest or in_memory:
            raise invalid(
                f"Expected whole rows, in the message. Received: {message.elements} elements in "
                f"rows of {message.row_elements} {where}."
            )
        try:
            return rows.unpack(data, dtype, message.row_elements, num_rows)
        except ValueError as e:
            raise invalid(f"{e} They are {where}.") from e
    if dtype is None or data is None or message.elements * dtype.itemsize != data.nbytes:
        raise invalid(
            f"Expected {message.elements} value(s) of a known dtype. Received: "
            f"dtype={message.dtype}, {payload.nbytes} bytes {where}."
        )
    return data.view(dtype)
