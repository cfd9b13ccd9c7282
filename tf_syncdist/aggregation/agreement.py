"""What workers must agree on about a run, and the errors that say that they do not. Pure."""

from collections.abc import Mapping

from tf_syncdist.aggregation.records import RoundError, SliceKey, SliceSpec


class SliceState:
    """A slice of a run that is not forgotten.

    Args:
        spec: What workers agree on.

    Attributes:
        contributors: The workers that are in it, in the order of their arrival.
        possible: How many may be in it at most.
        stamp: What was known of the workers when that was counted.
        closed: Whether no more are accepted.
        wait_until: When to ask the policy again about it,
        ask_at: and with how many contributions, if nothing else changes before.
    """

    __slots__ = ("ask_at", "closed", "contributors", "possible", "spec", "stamp", "wait_until")

    def __init__(self, spec: SliceSpec) -> None:
        self.spec = spec
        self.contributors: dict[int, None] = {}
        self.possible = 0
        self.stamp = -1
        self.closed = False
        self.wait_until: float | None = None
        self.ask_at = 0


def check_spec(worker: int, key: SliceKey, agreed: SliceSpec, spec: SliceSpec) -> None:
    """Checks that workers say the same of a slice.

    Raises:
        RoundError: If not.
    """
    if agreed == spec:
        return
    what = "shape or dtype" if agreed.layout == spec.layout else "list of shapes and dtypes"
    raise RoundError(
        f"Expected every worker to send the same {what} for slice {key.slice} of exchange "
        f"{key.exchange} in run {key.run}: {agreed.elements} x {agreed.dtype} in "
        f"{agreed.num_slices} slice(s), layout {agreed.layout:016x}, as the first worker did. "
        f"Received: {spec.elements} x {spec.dtype} in {spec.num_slices} slice(s), layout "
        f"{spec.layout:016x}, from worker {worker}. "
        "Build the same model and use the same optimizer on every worker."
    )


def check_all_closed(
    known: Mapping[int, Mapping[int, SliceState]], worker: int, run: int, exchanges: int
) -> None:
    """Checks that a run can be over.

    Args:
        known: The slices of each exchange of the run.
        worker: Who says that it is over.
        run: The run.
        exchanges: How many exchanges it had.

    Raises:
        RoundError: If it cannot.
    """
    # A shard without any slice of an exchange knows nothing about it.
    for exchange in sorted(e for e in known if e < exchanges):
        slices = known[exchange]
        num_slices = next(iter(slices.values())).spec.num_slices
        if len(slices) < num_slices or not all(s.closed for s in slices.values()):
            raise RoundError(
                f"Expected all slices of exchange {exchange} in run {run} to be closed before "
                f"the run is finished. Received: exchanges={exchanges} from worker {worker}, "
                f"while {sum(s.closed for s in slices.values())} of {num_slices} are closed."
            )
    if max(known, default=-1) >= exchanges:
        raise RoundError(
            f"Expected {max(known) + 1} or more exchange(s) in run {run}, as a worker has "
            f"contributed to. Received: exchanges={exchanges} from worker {worker}. "
            "Every worker must run the same program."
        )
