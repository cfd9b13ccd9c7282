"""Epoch exchanges: metric state summed over workers, one message per worker. Pure."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from tf_syncdist.aggregation.rounds import RoundError
from tf_syncdist.cutoff import CutoffPolicy, SliceView


class EpochClosed(NamedTuple):
    """An epoch exchange that has just been closed."""

    run: int
    contributors: tuple[int, ...]


class _Gather:
    def __init__(self, layout: int, elements: int, now: float) -> None:
        self.layout = layout
        self.elements = elements
        self.opened_at = now
        self.contributors: list[int] = []
        self.closed = False


class Epochs:
    """Decides whose metric state is in the result after a run, by the cutoff of the rounds.

    Args:
        num_workers: How many workers the job has.
        policy: The cutoff policy.
        begun: Tells how many runs a worker has begun. A worker that has gone on past an epoch
            exchange without taking part will not come, so nobody waits for it.
    """

    def __init__(self, num_workers: int, policy: CutoffPolicy, begun: Callable[[int], int]) -> None:
        self._num_workers = num_workers
        self._policy = policy
        self._begun = begun
        self._gathers: dict[int, _Gather] = {}
        self._present = set(range(num_workers))

    def contribute(self, worker: int, run: int, layout: int, elements: int, now: float) -> bool:
        """Takes note of a worker's message and returns whether its values are to be added.

        Args:
            worker: Index of the worker.
            run: How many runs it has done.
            layout: Fingerprint of what the values are.
            elements: How many they are.
            now: Time of arrival, in seconds.

        Raises:
            RoundError: If workers disagree on what is summed.
        """
        gather = self._gathers.setdefault(run, _Gather(layout, elements, now))
        if (gather.layout, gather.elements) != (layout, elements):
            raise RoundError(
                f"Expected the same metrics on every worker after run {run}: {gather.elements} "
                f"value(s), layout {gather.layout:016x}. Received: {elements} value(s), layout "
                f"{layout:016x}, from worker {worker}. Compile the same metrics on every worker."
            )
        if gather.closed or worker in gather.contributors:
            return False
        gather.contributors.append(worker)
        return True

    def close(self, now: float) -> list[EpochClosed]:
        """Closes what can be closed; ask after every message and after a worker left."""
        closed = []
        for run, gather in self._gathers.items():
            if gather.closed or not gather.contributors:
                continue
            to_come = {w for w in self._present if self._begun(w) <= run}
            view = SliceView(
                now=now,
                opened_at=gather.opened_at,
                contributions=len(gather.contributors),
                possible=len(to_come | set(gather.contributors)),
                num_workers=self._num_workers,
            )
            if self._policy.decide(view).close:
                gather.closed = True
                closed.append(EpochClosed(run, tuple(gather.contributors)))
        return closed

    @property
    def waiting(self) -> bool:
        """Whether an exchange is open."""
        return any(not gather.closed for gather in self._gathers.values())

    def leave(self, worker: int) -> None:
        """Stops waiting for a worker."""
        self._present.discard(worker)

    def forget(self, present: Collection[int]) -> list[int]:
        """Forgets exchanges that every present worker has gone past, and returns them."""
        done = min((self._begun(w) for w in present), default=0)
        gone = [run for run, gather in self._gathers.items() if gather.closed and run < done]
        for run in gone:
            del self._gathers[run]
        return gone
