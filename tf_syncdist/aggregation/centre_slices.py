"""One slice of the centre with which workers mix their models: its values, and who mixed what."""

import threading
from collections.abc import Sequence

import numpy as np

from tf_syncdist.mixing.centre_policies import CentrePolicy
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

DTYPES = {pb.FLOAT32: np.dtype("<f4"), pb.FLOAT64: np.dtype("<f8")}


class MixCounts:
    """What a slice has counted of one worker."""

    def __init__(self) -> None:
        self.mixed = 0
        self.staleness_sum = 0
        self.staleness_max = 0
        self.too_stale = 0

    def add(self, staleness: int, is_admitted: bool) -> None:
        """Takes note of values that have come."""
        if is_admitted:
            self.mixed += 1
            self.staleness_max = max(self.staleness_max, staleness)
            self.staleness_sum += staleness
        else:
            self.too_stale += 1


class CentreSlice:
    """Serves one request at a time.

    Args:
        given: The request that says what it holds.
        values: That.
        policy: How it takes in values.
        counts: For every worker, what is counted; `None` for a slice that does not count.

    Attributes:
        nbytes: Size of its values.
        version: How often it has taken in values.
    """

    def __init__(
        self,
        given: pb.CentreRequest,
        values: np.ndarray,
        policy: CentrePolicy,
        counts: Sequence[MixCounts] | None,
    ) -> None:
        self._counts = counts
        self.nbytes = values.nbytes
        self.version = given.version
        self._index, self._dtype = given.slice, given.dtype
        self._policy = policy
        self._values = values.copy()
        # By worker: its last request, and what became of it.
        self._served: dict[int, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    def fits(self, request: pb.CentreRequest) -> bool:
        """Returns whether a request is about a slice of this dtype and size."""
        return request.dtype == self._dtype and request.elements == self._values.size

    def serve(self, worker: int, request: pb.CentreRequest, values: np.ndarray | None) -> bytes:
        """Does what a worker asks for and returns the answer.

        Args:
            worker: The worker.
            request: What it asks for.
            values: Its values; `None` if the slice is only read.
        """
        answer = pb.CentreValue(
            slice=self._index,
            serial=request.serial,
            verdict=pb.CENTRE_DONE,
            dtype=self._dtype,
            elements=request.elements,
        )
        frame: wire.Frame[pb.ToWorker] = wire.Frame(self.nbytes)
        reply = frame.payload.view(self._values.dtype)
        with self._lock:
            # A worker may have values of a centre that died with its service.
            answer.staleness = max(0, self.version - request.version)
            if values is not None:
                answer.verdict, answer.staleness = self._verdict(
                    worker, request.serial, answer.staleness
                )
            if values is not None and answer.verdict == pb.CENTRE_DONE:
                self._policy.mix(self._values, values, reply)
                self.version += 1
            else:
                reply[...] = self._values
            answer.version = self.version
        return frame.seal(pb.ToWorker(centre_value=answer))

    def _verdict(self, worker: int, serial: int, staleness: int) -> tuple[int, int]:
        """Returns what becomes of a request, and how stale it is."""
        # A worker whose stream broke cannot know whether its last request was served.
        last, verdict, its_staleness = self._served.get(worker, (-1, 0, 0))
        if last == serial:
            repeated = verdict == pb.CENTRE_DONE
            return pb.CENTRE_REPEATED if repeated else verdict, its_staleness
        is_admitted = self._policy.admits(staleness)
        if self._counts is not None:
            self._counts[worker].add(staleness, is_admitted)
        verdict = pb.CENTRE_DONE if is_admitted else pb.CENTRE_TOO_STALE
        self._served[worker] = (serial, verdict, staleness)
        return verdict, staleness
