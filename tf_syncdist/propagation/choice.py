"""Whether sending by priority can help a job, from what its first rounds have cost. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

# Forward takes about a third of a step's computing; what is hidden behind it is gained.
_FORWARD_SHARE = 1 / 3
# What a slice costs all processes of a machine together, in CPU time.
_SLICE_SECONDS = 0.0005
# Less is not worth the slices, and cannot be told from noise.
_LEAST_GAIN = 0.05


class Measured(NamedTuple):
    """What one worker has measured, as medians over rounds in the order of backpropagation.

    Args:
        compute_seconds: From a round's begin until its last gradient was there.
        exposed_seconds: From then until the whole result was there: this part of the exchange was
            not hidden behind backpropagation.
    """

    compute_seconds: float
    exposed_seconds: float


class Choice(NamedTuple):
    """What is chosen, and why in one clause."""

    by_priority: bool
    reason: str


def choose(measured: Sequence[Measured], num_slices: int) -> Choice:
    """Chooses how gradients travel.

    A worker that is faster than the others waits for them, not for the network. So of what workers
    have waited the least is the network's part.

    Args:
        measured: Of the workers that have measured.
        num_slices: How many slices a round would have.
    """
    if not measured:
        return Choice(False, "nothing was measured")
    compute = max(m.compute_seconds for m in measured)
    exposed = min(m.exposed_seconds for m in measured)
    hidden = min(exposed, compute * _FORWARD_SHARE)
    cost = num_slices * _SLICE_SECONDS
    found = (
        f"of {compute + exposed:.3f} s per round {exposed:.3f} s are spent waiting for the network "
        f"after backpropagation; the next forward pass could hide {hidden:.3f} s of them, and "
        f"{num_slices} slices would cost {cost:.3f} s"
    )
    return Choice(hidden - cost > _LEAST_GAIN * (compute + exposed), found)
