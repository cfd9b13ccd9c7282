"""Sums what workers gather and tells them what came of it. One lock of the job's guards it."""

from collections.abc import Callable, Collection

import numpy as np

from tf_syncdist.aggregation import sums
from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.cutoffs import Cutoff
from tf_syncdist.aggregation.gathers import GatherKey, Gathers, Part, RecentResults
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.cutoff import Plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire


class GatherRelay:
    """The gathers of a job, with their values.

    Args:
        num_workers: How many workers the job has.
        policy: The cutoff policy.
        streams: The connected workers.
        begun: Tells how many runs a worker has begun.
        awaited: Returns the workers that take part.
        plan: Returns the last plan of a round.
    """

    def __init__(
        self,
        num_workers: int,
        policy: Cutoff,
        streams: Streams,
        begun: Callable[[int], int],
        awaited: Callable[[], Collection[int]],
        plan: Callable[[], Plan | None],
    ) -> None:
        self._gathers = Gathers(num_workers, policy, begun, awaited, plan)
        self._streams = streams
        self._begun = begun
        self._totals: dict[GatherKey, np.ndarray] = {}
        self._results = RecentResults()

    @property
    def waiting(self) -> bool:
        """Whether a gather is open."""
        return self._gathers.waiting

    @property
    def wake_at(self) -> float | None:
        """When to call `close` if nothing changes before, in seconds; `None` for never."""
        return self._gathers.wake_at

    def add(self, worker: int, message: pb.Gather, payload: memoryview, now: float) -> None:
        """Adds a worker's values."""
        if payload.nbytes % 8 or not message.kind:
            raise invalid(
                "Expected float64 values and what they are gathered for. Received: "
                f"{payload.nbytes} bytes, kind={message.kind}, from worker {worker}."
            )
        if message.run > self._begun(worker):
            raise invalid(
                f"Expected a gather after at most {self._begun(worker)} run(s), which "
                f"worker {worker} has begun. Received: run={message.run}."
            )
        values = np.frombuffer(payload, "<f8")
        key = GatherKey(message.kind, message.serial)
        part = Part(
            message.run,
            message.layout,
            values.size,
            tuple(message.hashes),
            message.stop,
            message.empty,
        )
        if key not in self._results:
            # Without a result to give, it is better alone in it than waiting for ever.
            self._gathers.drop(key)
        if self._gathers.contribute(worker, key, part, now):
            total = self._totals.setdefault(key, np.zeros(values.size))
            sums.add(total, None, values)
        elif key in self._results:
            # Who has taken over a later state may have thrown away what it was told before.
            self._streams[worker].put(self._results[key])
        self.close(now)

    def close(self, now: float) -> None:
        """Closes what can be closed; to be called when anything has changed."""
        for gather in self._gathers.close(now):
            result = pb.GatherResult(
                kind=gather.key.kind,
                serial=gather.key.serial,
                run=gather.run,
                contributors=gather.contributors,
                reference=gather.reference,
                hashes=gather.hashes,
                stop=gather.stop,
            )
            self._tell(gather.key, result, memoryview(self._totals.pop(gather.key)).cast("B"))

    def restore(self, message: pb.GatherResult, payload: memoryview) -> None:
        """Takes what was gathered from a worker that has it, and tells it to the others."""
        key = GatherKey(message.kind, message.serial)
        if self._gathers.restore(key, message.run):
            # A worker that is new may have begun with it anew.
            self._totals.pop(key, None)
            self._tell(key, message, payload)

    def catch_up(self, worker: int) -> None:
        """Tells a worker what the others have been told and it may wait for."""
        for message in self._results.values():
            self._streams[worker].put(message)

    def enter(self, worker: int, run: int) -> None:
        """Takes note of a new process of a worker, whose program begins after `run` runs."""
        self._gathers.arrive(worker)
        self._gathers.skip(worker, run)

    def skip(self, worker: int, run: int) -> None:
        """Keeps what was gathered after `run` runs for a worker that has yet to ask for it."""
        self._gathers.skip(worker, run)

    def forget(self, worker: int, present: Collection[int]) -> None:
        """Forgets what every present worker has gone past, now that a worker has done a run."""
        self._gathers.arrive(worker)
        for key in self._gathers.forget(present):
            self._results.pop(key, None)

    def _tell(self, key: GatherKey, result: pb.GatherResult, total: memoryview) -> None:
        message = self._results[key] = wire.encode(pb.ToWorker(gather_result=result), total)
        for outbox in self._streams.values():
            outbox.put(message)
