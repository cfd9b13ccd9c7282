"""Do all workers train the same variables? Pure."""

import math
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
    def elements(self) -> int:
        """Number of elements; 0 if the shape cannot be."""
        return math.prod(max(0, d) for d in self.shape)

    @property
    def fingerprint(self) -> int:
        """64 bits of all three; the same in every process."""
        return layout_of([(self.name, self.dtype, self.shape)])


def first_difference(manifests: Mapping[int, Sequence[Variable]], first: int = 0) -> str:
    """Names the first variable in which a worker differs from another one.

    Args:
        manifests: For every worker, the variables that it is about to train, in its order.
        first: The worker with which the others are compared.

    Returns:
        A sentence, or an empty string if all agree.
    """
    reference = manifests[first]
    for worker in sorted(manifests):
        variables = manifests[worker]
        for index, (expected, received) in enumerate(zip(reference, variables, strict=False)):
            if expected != received:
                return (
                    "Expected every worker to train the same variables. Received: variable "
                    f"{index} is {expected} on worker {first} and {received} on worker {worker}. "
                    "Build the same model and use the same optimizer on every worker."
                )
        if len(variables) != len(reference):
            longer, more = (
                (first, reference) if len(reference) > len(variables) else (worker, variables)
            )
            extra = more[min(len(reference), len(variables))]
            return (
                "Expected every worker to train the same variables. Received: "
                f"{len(reference)} variable(s) on worker {first} and {len(variables)} on worker "
                f"{worker}; the first that differs is {extra}, which only worker {longer} has. "
                "Build the same model and use the same optimizer on every worker."
            )
    return ""
