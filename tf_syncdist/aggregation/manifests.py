"""Do all workers train the same variables? Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tf_syncdist.propagation.slices import layout_of

# Whatever a worker says, an error is to stay short.
_MOST_SHOWN = 200


class Variable(NamedTuple):
    """Name, dtype and shape of one variable."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        shape = str(list(self.shape[:_MOST_SHOWN]))
        return f"{self.name[:_MOST_SHOWN]} ({self.dtype[:_MOST_SHOWN]}, shape {shape})"

    @property
    def fingerprint(self) -> int:
        """64 bits of all three; the same in every process."""
        return layout_of([(self.name, self.dtype, self.shape)])


def first_difference(manifests: Mapping[int, Sequence[Variable]]) -> str:
    """Names the first variable in which a worker differs from worker 0.

    Args:
        manifests: For every worker, the variables that it is about to train, in its order.

    Returns:
        A sentence, or an empty string if all agree.
    """
    reference = manifests[0]
    for worker in sorted(manifests):
        variables = manifests[worker]
        for index, (expected, received) in enumerate(zip(reference, variables, strict=False)):
            if expected != received:
                return (
                    "Expected every worker to train the same variables. Received: variable "
                    f"{index} is {expected} on worker 0 and {received} on worker {worker}. "
                    "Build the same model and use the same optimizer on every worker."
                )
        if len(variables) != len(reference):
            longer, more = (
                (0, reference) if len(reference) > len(variables) else (worker, variables)
            )
            extra = more[min(len(reference), len(variables))]
            return (
                "Expected every worker to train the same variables. Received: "
                f"{len(reference)} variable(s) on worker 0 and {len(variables)} on worker "
                f"{worker}; the first that differs is {extra}, which only worker {longer} has. "
                "Build the same model and use the same optimizer on every worker."
            )
    return ""
