"""What becomes of a worker's values that are not finite. Pure."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tf_syncdist.errors import NonFiniteGradientError
from tf_syncdist.propagation.rows import Rows
from tf_syncdist.propagation.slices import TensorSpec

POLICIES = ("pass", "drop", "error")

# A piece and what is made of it stay in the cache.
_PIECE_ELEMENTS = 1 << 16


class Inspection:
    """Looks at a worker's own values before any of them is sent.

    Args:
        policy: One of `POLICIES`.
        worker: Index of the worker.

    Attributes:
        looks: Whether values are looked at; if so, an exchange is sent when all of it is there.
        rounds: In how many rounds something was not finite.
        found: Whether something was in this round.
    """

    def __init__(self, policy: str, worker: int) -> None:
        self.looks = policy != "pass"
        self.rounds = 0
        self.found = False
        self._raises = policy == "error"
        self._worker = worker

    def begin_run(self) -> None:
        """Takes note that what comes belongs to another round."""
        self.found = False

    def rejects(
        self,
        run: int,
        exchange: int,
        tensors: Mapping[int, np.ndarray | Rows],
        name_of: Callable[[int, int], str],
    ) -> bool:
        """Returns whether the tensors of an exchange are to be kept back.

        Args:
            run: The run, for the error.
            exchange: Number of the exchange in the run.
            tensors: The tensors by their numbers.
            name_of: Returns the name of the variable that a tensor of an exchange is for, or "".

        Raises:
            NonFiniteGradientError: If that is the policy.
        """
        tensor = first_nonfinite(tensors) if self.looks else None
        if tensor is None:
            return False
        self.rounds += not self.found
        self.found = True
        if self._raises:
            name = name_of(exchange, tensor)
            variable = f", that of {name!r}," if name else ""
            raise NonFiniteGradientError(
                'Expected finite gradients, because nonfinite="error" was given. Received: NaN or '
                f"Inf in tensor {tensor}{variable} of exchange {exchange} in run {run} on worker "
                f"{self._worker}. Look at this worker's input of that run and at the learning "
                'rate, or use nonfinite="drop" to go on without such contributions.'
            )
        return True


def first_nonfinite(tensors: Mapping[int, np.ndarray | Rows]) -> int | None:
    """Returns the lowest number of a tensor that holds NaN or Inf, or `None`.

    Args:
        tensors: Tensors by their numbers; integers are finite.
    """
    for number in sorted(tensors):
        tensor = tensors[number]
        if not _is_finite(tensor.values if isinstance(tensor, Rows) else tensor):
            return number
    return None


def zeros(specs: Sequence[TensorSpec]) -> list[np.ndarray | Rows]:
    """Returns tensors without any value, by rows where that is how they travel."""
    made: list[np.ndarray | Rows] = []
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        if spec.by_rows:
            row_elements = spec.elements // max(spec.shape[0], 1)
            made.append(Rows(np.empty(0, np.int64), np.empty((0, row_elements), dtype)))
        else:
            made.append(np.zeros(spec.shape, dtype))
    return made


def _is_finite(array: np.ndarray) -> bool:
    if np.issubdtype(array.dtype, np.integer):
        return True
    flat = np.ascontiguousarray(array).reshape(-1)
    starts = range(0, flat.size, _PIECE_ELEMENTS)
    return all(bool(np.isfinite(flat[s : s + _PIECE_ELEMENTS]).all()) for s in starts)
