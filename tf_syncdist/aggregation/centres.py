"""The centres of a job on one shard: which there are, and who gives one that is not there yet.

Every training has a centre of its own, and a new one whenever the program has written the variables
itself. Workers come from one to the next by their own clocks, so there may be several at a time.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.centre import Centre
from tf_syncdist.aggregation.centre_slices import CentreSlice, MixCounts
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.mixing.centre_policies import CentrePolicy
from tf_syncdist.proto import tf_syncdist_pb2 as pb


class _Held(NamedTuple):
    """What a worker has of a centre of the service before this one."""

    key: tuple[int, int]
    version: int


class Centres:
    """All centres on one shard.

    Nobody is asked for a centre before `go_on`: somebody may come who has a newer one.

    Args:
        policy: How they take in models.
        num_workers: How many workers the job has.
        streams: The connected workers.
        expected: Returns the workers that take part, or may come yet.
        on_event: Called with one line for the service's log.
        most_bytes: How many bytes one of them may have.
        decides: Whether this is the shard that decides who gives a centre. Others are told of one
            by the worker that gives it.
    """

    def __init__(
        self,
        policy: CentrePolicy,
        num_workers: int,
        streams: Streams,
        expected: Callable[[], set[int]],
        on_event: Callable[[str], None],
        most_bytes: int,
        decides: bool = True,
    ) -> None:
        self._policy = policy
        self._streams = streams
        self._expected = expected
        self._on_event = on_event
        self._most_bytes = most_bytes
        self._decides = decides
        self._counts = [MixCounts() for _ in range(num_workers)]
        self._centres: dict[tuple[int, int], Centre] = {}
        # Where each worker is.
        self._at: dict[int, tuple[int, int]] = {}
        self._held: dict[int, _Held] = {}
        self._goes_on = False
        # Whether any centre has ever been given.
        self._has_begun = False

    @property
    def nbytes(self) -> int:
        """How many bytes all of them have."""
        return sum(centre.nbytes for centre in self._centres.values())

    def waits(self) -> tuple[int, ...]:
        """Returns the workers that have to give centres for which others wait."""
        if not self._goes_on:
            return ()
        return tuple(sorted({w for centre in self._centres.values() for w in centre.waits()}))

    def hold(self) -> None:
        """Asks nobody for now."""
        self._goes_on = False

    def go_on(self, standings: Mapping[int, pb.Standing] | None = None) -> None:
        """Asks for centres that are wanted, from now on.

        Args:
            standings: What workers know, if the service was started again.
        """
        if self._goes_on and standings is None:
            return
        for worker, standing in (standings or {}).items():
            if standing.centre_version:
                key = (standing.centre_fit, standing.centre_revision)
                self._held[worker] = _Held(key, standing.centre_version)
                self._has_begun = True
        self._goes_on = True
        self._choose()

    def open(self, worker: int, message: pb.CentreOpen) -> None:
        """Takes note of the centre that a worker wants, and tells it whether it is there.

        Raises:
            Refused: If it wants more than the service may keep.
        """
        self.reopen(worker)
        key = (message.fit, message.revision)
        if message.joins:
            # Where its former process was does not count, nor do others that are away.
            self._at.pop(worker, None)
            expected = self._expected()
            if key not in {at for other, at in self._at.items() if other in expected}:
                alike = [k for k, centre in self._centres.items() if centre.is_of(message)]
                key = max((*alike, *(held.key for held in self._held.values())), default=key)
        centre = self._centres.get(key)
        if centre is None:
            centre = self._centres[key] = Centre(
                key,
                self._policy,
                self._streams,
                lambda: self._giver(key),
                lambda: self._holders(key),
                lambda text: self._complete(key, text),
                self._most_bytes,
                self._counts,
            )
        self._at[worker] = key
        if worker in self._held and self._held[worker].key != key:
            # It has gone on, and is not going to give what it had.
            del self._held[worker]
        centre.open(worker, message)
        self._forget()
        self._choose()

    def begin(self, worker: int) -> None:
        """Takes note that a worker comes as a process that holds nothing."""
        if self._held.pop(worker, None) is not None:
            self._choose()

    def reopen(self, worker: int) -> None:
        """Takes note that a worker has another stream now."""
        if worker in self._at and self._at[worker] in self._centres:
            self._centres[self._at[worker]].leave(worker)
            self._choose()

    def leave(self, worker: int, for_good: bool) -> None:
        """Takes note that a worker takes part no more."""
        if for_good:
            self._held.pop(worker, None)
        self.reopen(worker)
        # It may have been due to give a centre that it has never asked for itself.
        self._choose()
        if for_good:
            self._at.pop(worker, None)
            self._forget()

    def give(self, worker: int, request: pb.CentreRequest, values: np.ndarray) -> None:
        """Takes a slice of a centre from the worker that was asked for it.

        Raises:
            Refused: If it was not asked, or gives more than it should.
        """
        self._centre_of(worker).give(worker, request, values)

    def claim(self, worker: int, request: pb.CentreRequest) -> CentreSlice:
        """Returns the slice that a request is about.

        Raises:
            Refused: If there is none, or it is another one than the worker believes.
        """
        return self._centre_of(worker).claim(worker, request)

    def report(self, reply: pb.ReportReply) -> None:
        """Adds what was counted to the counters of a job."""
        reply.centre_bytes = self.nbytes
        for worker, counts in zip(reply.workers, self._counts, strict=True):
            worker.mixed, worker.too_stale = counts.mixed, counts.too_stale
            worker.staleness_sum = counts.staleness_sum
            worker.staleness_max = counts.staleness_max

    # How.

    def _centre_of(self, worker: int) -> Centre:
        centre = self._centres.get(self._at.get(worker, (-1, -1)))
        if centre is None:
            raise invalid(
                "Expected requests about the centre from workers that have said which variables "
                f"theirs are. Received: one from worker {worker}."
            )
        return centre

    def _giver(self, key: tuple[int, int]) -> int | None:
        """Returns worker 0 for the first centre of a job, and nobody for later ones."""
        is_first = self._decides and not self._has_begun and self._at.get(0, key) <= key
        return 0 if is_first and 0 in self._expected() else None

    def _holders(self, key: tuple[int, int]) -> dict[int, int]:
        # Also those that are away: what they hold is worth waiting for until they are given up.
        return {w: held.version for w, held in self._held.items() if held.key == key}

    def _complete(self, key: tuple[int, int], text: str) -> None:
        self._has_begun = True
        self._held = {w: held for w, held in self._held.items() if held.key != key}
        self._on_event(text)

    def _choose(self) -> None:
        for centre in list(self._centres.values()) if self._goes_on else ():
            centre.choose()

    def _forget(self) -> None:
        wanted = set(self._at.values())
        if self._expected():
            # Who comes when all others have ended begins with what they came to.
            wanted.add(max((k for k, c in self._centres.items() if c.is_there), default=(-1, -1)))
        self._centres = {k: c for k, c in self._centres.items() if k in wanted}
