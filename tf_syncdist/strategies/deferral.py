"""The update of a run that is made where the next one begins. Knows no TensorFlow."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from tf_syncdist.propagation.slices import Plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies.buffers import Buffers
from tf_syncdist.strategies.run_timeline import RunTimeline
from tf_syncdist.transport.session import Session


class DeferringSite(Protocol):
    """A place in a program where training runs happen whose updates can wait."""

    def defers_update_of(self, variable: int) -> bool:
        """Returns whether a variable, by its identity, is updated by what is deferred."""
        ...

    def apply_pending(self, arrays: Sequence[np.ndarray], settings: Sequence[np.ndarray]) -> None:
        """Makes the update, outside of a run."""
        ...


@dataclasses.dataclass
class Pending:
    """A run whose last exchange has been sent, and whose update has not been made.

    Args:
        site: Where it happened.
        run: The run.
        exchanges: How many exchanges it had.
        fate: What became of this worker's part in it, as far as is known.
        computes: Whether this worker has sent values.
        nonfinite: Whether it has kept back values that were not finite.
        way: How the last exchange is cut.
        exchange: Its number in the run.
        settings: What the update needs of the run besides, such as its learning rate.
        lost: Whether the result can no longer be had.
        withheld: Whether this worker keeps its values back.
    """

    site: DeferringSite
    run: int
    exchanges: int
    fate: int
    computes: bool
    nonfinite: bool
    way: Plan | None = None
    exchange: int = 0
    settings: list[np.ndarray] = dataclasses.field(default_factory=list)
    lost: bool = False
    withheld: bool = False
    results: list[np.ndarray] = dataclasses.field(default_factory=list)


class Deferral:
    """Keeps the run whose update is pending, receives its result in parts, and ends it.

    Args:
        session: The connection to the service.
        buffers: Memory for results.
        give_zeros: Contributes to an exchange to which nobody else does either.
        timeline: Where it is recorded what is applied.
        clock: Returns the time in seconds; monotonic.

    Attributes:
        pending: The run whose update has not been made.
        lock: Held while an update is made outside of a run, and while a run begins.
        received_at: When the last update that was made outside of a run was there.
    """

    def __init__(
        self,
        session: Session,
        buffers: Buffers,
        give_zeros: Callable[[int, int, Plan], None],
        timeline: RunTimeline,
        clock: Callable[[], float],
    ) -> None:
        self.pending: Pending | None = None
        self._session = session
        self._buffers = buffers
        self._give_zeros = give_zeros
        self._clock = clock
        self._timeline = timeline
        self._held: tuple[Plan, int, list[np.ndarray]] | None = None
        # Whoever reads a variable may be on any thread, and several may read at a time.
        self.lock = threading.RLock()
        self.received_at = 0.0
        self._settles = False

    def hold(self, way: Plan, exchange: int, settings: Sequence[np.ndarray]) -> None:
        """Takes note of the exchange of the run in progress whose result is to wait."""
        # TensorFlow may use its memory again.
        self._held = (way, exchange, [np.array(s) for s in settings])

    def begin(self, pending: Pending) -> None:
        """Takes note that the run is done but for its update."""
        pending.way, pending.exchange, pending.settings = self._held
        self._held = None
        self.pending = pending

    def receive(self, number: int) -> list[np.ndarray]:
        """Waits for a bucket of the pending exchange and returns its tensors."""
        self._timeline.applied()
        pending = self.pending
        if not pending.results:
            pending.results = self._buffers.take(pending.way.specs)
        bucket = pending.way.buckets[number]
        give_zeros = None
        if pending.withheld:
            give_zeros = functools.partial(
                self._give_zeros, pending.run, pending.exchange, pending.way
            )
        if not pending.lost:
            found = self._session.receive(
                pending.run,
                pending.exchange,
                pending.way,
                pending.results,
                give_zeros,
                bucket.slices,
            )
            if found is None:
                pending.lost = True
            elif pending.computes and found[0] < found[1]:
                pending.fate = pb.LATE
        if pending.lost:
            # What is made of it is overwritten by another worker's state.
            return [
                np.zeros(pending.way.specs[t].shape, pending.way.specs[t].dtype)
                for t in bucket.tensors
            ]
        self._timeline.applies(pending.run, bucket)
        return [pending.results[t] for t in bucket.tensors]

    def finish(self) -> None:
        """Tells the service that the pending run is done."""
        self._timeline.applied()
        pending, self.pending = self.pending, None
        self._session.finish(pending.run, pending.exchanges, pending.fate, pending.nonfinite)

    def drop(self) -> None:
        """Forgets the pending update: a state was taken over that has it."""
        self.pending = None

    def settle(self) -> bool:
        """Makes the pending update, outside of a run, if there is one; the lock is to be held.

        Returns:
            Whether its result can no longer be had, so that a state has to be taken over.
        """
        pending = self.pending
        if pending is None or self._settles:
            return False
        self._settles = True
        try:
            arrays = [None] * len(pending.way.specs)
            for number, bucket in reversed(list(enumerate(pending.way.buckets))):
                for tensor, array in zip(bucket.tensors, self.receive(number), strict=True):
                    arrays[tensor] = array
            self.received_at = self._clock()
            if pending.lost:
                return True
            pending.site.apply_pending(arrays, pending.settings)
            self.finish()
            return False
        finally:
            self._settles = False
