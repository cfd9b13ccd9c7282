"""Puts a job together again from what its workers know. One lock of the job's guards it."""

from tf_syncdist.aggregation.delivery import Delivery
from tf_syncdist.aggregation.end_relay import EndRelay
from tf_syncdist.aggregation.gather_relay import GatherRelay
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.aggregation.records import SliceKey
from tf_syncdist.aggregation.recovery import Recovery, spec_of
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.proto import tf_syncdist_pb2 as pb


class Restoring:
    """A recovery in progress, with the values of results and the workers' streams.

    Args:
        now: When it begins, in seconds.
        streams: The connected workers.
    """

    def __init__(self, now: float, streams: Streams) -> None:
        self._recovery = Recovery(now)
        self._streams = streams
        self._payloads: dict[SliceKey, memoryview] = {}
        self._gathered: list[tuple[pb.GatherResult, memoryview]] = []

    @property
    def standings(self) -> dict[int, pb.Standing]:
        """What each worker that was there before has said."""
        return self._recovery.standings

    @property
    def job_seed(self) -> int:
        """The job's name and seed."""
        return next(iter(self.standings.values())).job_seed

    @property
    def epoch(self) -> pb.EpochBegun:
        """The newest epoch that a worker has begun."""
        epochs = [s.epoch for s in self.standings.values()]
        return max(epochs, key=lambda e: (e.fit, e.epoch))

    @property
    def variables(self) -> set[int]:
        """Fingerprints of the variables that workers hold in common."""
        return {v for s in self.standings.values() for v in s.variables}

    def add(self, worker: int, standing: pb.Standing | None, now: float) -> None:
        """Takes note of a worker that has come, and of what it knows, if it was there before."""
        if standing is None:
            self._recovery.add_new(worker)
        else:
            self._recovery.add(worker, standing, now)

    def drop(self, worker: int) -> None:
        """Takes note that a worker is gone."""
        self._recovery.drop(worker)

    def stored(self, worker: int, result: pb.Result, payload: memoryview) -> None:
        """Takes a result that a worker was asked for."""
        if self._recovery.stored(worker, result):
            key = SliceKey(result.run, result.exchange, result.slice)
            self._payloads[key] = payload

    def stored_gather(self, result: pb.GatherResult, payload: memoryview) -> None:
        """Takes what was gathered last from a worker."""
        self._gathered.append((result, payload))

    def is_complete(self, now: float) -> bool:
        """Asks workers for what is missing; returns whether nothing is."""
        if not self.standings:
            return False
        for want in self._recovery.wants(now):
            run, exchange, part = want.key
            message = pb.WantResult(run=run, exchange=exchange, slice=part)
            self._streams.tell(want.holder, pb.ToWorker(want_result=message))
        return self._recovery.is_complete(now)

    def restore(
        self, rounds: Rounds, delivery: Delivery, gathers: GatherRelay, ends: EndRelay
    ) -> str:
        """Fills the machines of a new service; returns in words with what."""
        restored = self._recovery.restored()
        closed = [
            (key, spec_of(result), tuple(result.contributors))
            for key, result in sorted(restored.results.items())
        ]
        rounds.restore(restored.positions, restored.counts, restored.exchanges, closed)
        for worker, standing in self.standings.items():
            rounds.counts[worker].nonfinite = standing.nonfinite
        for key, result in sorted(restored.results.items()):
            delivery.restore(key.run, result, self._payloads[key])
        for result, payload in self._gathered:
            gathers.restore(result, payload)
        ends.restore(self.standings.values())
        positions = ", ".join(f"{w}: {run}" for w, run in sorted(restored.positions.items()))
        return f"workers in rounds {{{positions}}}, {len(closed)} result(s) of theirs"
