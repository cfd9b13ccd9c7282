"""The exchanges of one run: what a worker gives, what it keeps back, and what it is given."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from tf_syncdist.propagation.rows import Rows
from tf_syncdist.propagation.slices import Bucket, Plan
from tf_syncdist.strategies.buffers import Buffers
from tf_syncdist.strategies.nonfinite import Inspection, zeros
from tf_syncdist.strategies.run_types import RunSite
from tf_syncdist.transport.session import Session


class RunExchanges:
    """Sends this worker's values of the run in progress and receives the results.

    Args:
        session: The connection to the service.
        inspection: Looks at values before they are sent.

    Attributes:
        buffers: Memory for results.
        count: How many exchanges the run has had so far.
        gives: Whether this worker gives values in this run.
        late: Whether some of them came too late.
        lost: Whether a result can no longer be had.
        withheld: Whether it keeps its values back.
    """

    def __init__(self, session: Session, inspection: Inspection) -> None:
        self.buffers = Buffers()
        self.inspection = inspection
        self._session = session
        self.begin(0, None)

    def begin(self, run: int, site: RunSite | None) -> None:
        """Takes note that a run begins."""
        self.count = 0
        self._collected: dict[int, np.ndarray | Rows] = {}
        self.gives = False
        self.late = self.lost = self.withheld = False
        self._run = run
        self._site = site
        self.inspection.begin_run()

    def next(self) -> int:
        """Returns the number of the next exchange, which is the current one from now on."""
        self.count += 1
        return self.count - 1

    def send(self, way: Plan, buckets: Sequence[Bucket], arrays: Sequence[np.ndarray]) -> None:
        """Sends the tensors of some buckets of the next exchange, in their order."""
        if not self.gives or self.withheld:
            return
        self._send(way, buckets, _by_number(way, buckets, arrays))

    def send_as(
        self, other: Plan, way: Plan, buckets: Sequence[Bucket], arrays: Sequence[np.ndarray]
    ) -> None:
        """Sends the same by another plan, as far as that plan's buckets are complete."""
        if not self.gives or self.withheld:
            return
        before = set(self._collected)
        self._collected |= _by_number(way, buckets, arrays)
        complete = [
            b
            for b in other.buckets
            if not before.issuperset(b.tensors) and self._collected.keys() >= set(b.tensors)
        ]
        self._send(other, complete, self._collected)

    def _send(
        self, way: Plan, buckets: Sequence[Bucket], tensors: Mapping[int, np.ndarray | Rows]
    ) -> None:
        if self._session.exchanges_of(self._run) is not None:
            if not self.late:
                self._session.send_late(self._run)
            self.late = True
        else:
            self._session.send(self._run, self.count, way, tensors, buckets)

    def look_at(self, way: Plan, buckets: Sequence[Bucket], arrays: Sequence[np.ndarray]) -> None:
        """Keeps an exchange's values back if they are to be finite and are not."""
        if self.gives and not self.withheld:
            tensors = _by_number(way, buckets, arrays)
            if self.inspection.rejects(self._run, self.count, tensors, self._site.name_of):
                self.withhold()

    def withhold(self) -> None:
        """Keeps back what this worker would give in later exchanges of the run."""
        if self.gives and not self.withheld:
            self.withheld = self.late = True
            self._session.send_late(self._run)

    def give_zeros(self, run: int, number: int, way: Plan) -> None:
        """Contributes to an exchange to which nobody else does either, so that it can end."""
        self.withheld = False
        self._session.send(run, number, way, zeros(way.specs))

    def receive(self, number: int, way: Plan, computes: bool) -> list[np.ndarray]:
        """Waits for the result of an exchange.

        Args:
            number: Which one.
            way: How it is cut.
            computes: Whether this worker should be in it.
        """
        results = self.buffers.take(way.specs)
        give_zeros = None
        if self.withheld:
            give_zeros = functools.partial(self.give_zeros, self._run, number, way)
        found = self._session.receive(self._run, number, way, results, give_zeros)
        if found is None:
            # The service heard so late of this run that it had forgotten the results. What the
            # run makes of zeros is overwritten by another worker's state when it ends.
            self.lost = True
            return [np.zeros(s.shape, s.dtype) for s in way.specs]
        used, total = found
        if computes and used < total:
            self.late = True
        return results


def _by_number(
    way: Plan, buckets: Sequence[Bucket], arrays: Sequence[np.ndarray]
) -> dict[int, np.ndarray | Rows]:
    found: dict[int, np.ndarray | Rows] = {}
    remaining = iter(arrays)
    for tensor in (t for bucket in buckets for t in bucket.tensors):
        array = next(remaining)
        if way.specs[tensor].by_rows:
            values = next(remaining)
            array = Rows(array.astype(np.int64), values.reshape(len(array), -1))
        found[tensor] = array
    return found
