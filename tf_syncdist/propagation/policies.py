"""How the gradients of a round travel: small frozen objects that a user gives to a strategy."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from tf_syncdist.propagation.queue import IN_ORDER
from tf_syncdist.propagation.slices import Plan, TensorSpec, plan, plan_by_priority

MAX_SLICE_ELEMENTS = 16 * 2**20
MAX_CREDIT_BYTES = 2**30


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _check_elements(name: str, value: int) -> None:
    if not _is_size(value, MAX_SLICE_ELEMENTS):
        raise ValueError(
            f"`slice_elements` must be an int from 1 to {MAX_SLICE_ELEMENTS}. Received: "
            f"slice_elements={value!r}. {name}'s default suits most networks."
        )


@dataclasses.dataclass(frozen=True)
class FifoPropagation:
    """Sends gradients in the order in which backpropagation yields them; the step waits for all.

    Tensors share messages of some megabytes (see `bucket_bytes` of `SyncReplicasStrategy`), which
    costs the CPU least. Right for fast networks.

    Args:
        overlap: Whether a bucket leaves as soon as backpropagation has yielded it. Default: `True`;
            `False`, which sends everything when the last gradient is there, is for comparison.
        slice_elements: If given, tensors are cut into slices of so many elements in place of
            buckets, as `PriorityPropagation` does, for comparison. Default: `None`.

    Raises:
        ValueError: If `slice_elements` is below 1 or too large for a message.
    """

    overlap: bool = True
    slice_elements: int | None = None

    def __post_init__(self) -> None:
        if self.slice_elements is not None:
            _check_elements("FifoPropagation", self.slice_elements)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class PriorityPropagation:
    """Sends what the next forward pass needs first, and does not wait for the rest (P3).

    Tensors are cut into slices that are sent, summed and returned independently, the first layers'
    first. The update of a variable is made where the next run begins, just before the layer that
    reads it, so that the exchange overlaps with that forward pass as well. The results are the same
    bits as without it. Use it where the network sets the pace: it costs CPU time per slice.

    Args:
        slice_elements: Into how many elements tensors are cut; smaller neighbours share a slice.
            Larger slices cost less CPU, but an urgent one waits longer for the one before it.
            Default: 50,000.
        credit_bytes: How much each side may have sent without being told that it has arrived. An
            urgent slice waits for at most that much. Raise it for networks with a long delay: the
            bandwidth times the round trip has to fit in. Default: 512 KiB.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Jayarajan et al.: Priority-based Parameter Propagation for Distributed DNN Training,
        arXiv 1905.03960, section 4. The credit is that of Peng et al., ByteScheduler (SOSP 2019).
    """

    slice_elements: int = 50_000
    credit_bytes: int = 512 * 2**10

    def __post_init__(self) -> None:
        _check_elements("PriorityPropagation", self.slice_elements)
        if not _is_size(self.credit_bytes, MAX_CREDIT_BYTES):
            raise ValueError(
                f"`credit_bytes` must be an int from 1 to {MAX_CREDIT_BYTES}. Received: "
                f"credit_bytes={self.credit_bytes!r}. With less than a slice, every slice waits "
                "until the one before it has arrived."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that recreate it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class AutoPropagation(PriorityPropagation):
    """Measures the first rounds, and sends by priority only where that can help.

    The first sixteen rounds of a job travel as with `FifoPropagation`. Then all workers compare how
    long they wait for gradients after backpropagation with what the next forward pass could hide
    and with what slices cost, and worker 0 says which it is and why. Where the update of a training
    function cannot wait for the next run, it stays as with `FifoPropagation`.
    """


Propagation = FifoPropagation | PriorityPropagation


def cutter(
    propagation: Propagation, bucket_bytes: int | None, num_shards: int, num_workers: int
) -> Callable[[Sequence[TensorSpec], Sequence[int] | None], Plan]:
    """Returns the function that cuts the tensors of an exchange.

    Args:
        propagation: How they travel.
        bucket_bytes: See `SyncReplicasStrategy`.
        num_shards: Over how many shards slices are spread.
        num_workers: How many workers the job has.

    Returns:
        A function of the tensors and, if that is known, of when the forward pass uses each first;
        their own order stands for it otherwise.
    """
    slice_elements = propagation.slice_elements
    is_auto = isinstance(propagation, AutoPropagation)

    def cut(specs: Sequence[TensorSpec], priorities: Sequence[int] | None = None) -> Plan:
        if slice_elements is None:
            return plan(specs, bucket_bytes, num_shards, num_workers)
        if is_auto and priorities is None:
            return _in_order(plan(specs, bucket_bytes, num_shards, num_workers))
        if priorities is None:
            priorities = range(len(specs))
        return plan_by_priority(specs, priorities, slice_elements, num_shards)

    return cut


def _in_order(way: Plan) -> Plan:
    """Returns a plan whose slices leave in the order in which they are made."""
    buckets = [
        b._replace(slices=tuple(s._replace(priority=IN_ORDER) for s in b.slices))
        for b in way.buckets
    ]
    return way._replace(buckets=tuple(buckets))


def serialize(propagation: Propagation) -> str:
    """Returns text that is the same exactly for equal objects; workers compare it."""
    text = {"class_name": type(propagation).__name__, "config": propagation.get_config()}
    return json.dumps(text, sort_keys=True)
