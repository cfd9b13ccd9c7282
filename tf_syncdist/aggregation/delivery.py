"""Sums of contributions on their way to the workers: who is sent which result when."""

import numpy as np

from tf_syncdist.aggregation import sums
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.aggregation.rounds import Closed, Progress, Rounds, RunOver, SliceKey
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# Results travel to a worker up to this many runs ahead of it, so that a replay finds the next
# result there already, while a worker that is stuck does not pile up the job's history.
WINDOW_RUNS = 4


class Delivery:
    """Adds contributions, keeps results, and sends them to every worker within its window.

    Args:
        streams: The connected workers.
        rounds: Decides what is added, closed and kept.
    """

    def __init__(self, streams: Streams, rounds: Rounds) -> None:
        self._streams = streams
        self._rounds = rounds
        self._totals: dict[SliceKey, np.ndarray] = {}
        self._specs: dict[SliceKey, pb.Contribution] = {}
        self._results: dict[int, list[bytes]] = {}

    def add(self, key: SliceKey, message: pb.Contribution, values: np.ndarray) -> None:
        """Adds a worker's values to a slice."""
        self._totals[key] = sums.add(self._totals.get(key), values)
        self._specs[key] = message

    def published(self, run: int) -> bool:
        """Returns whether any result of a run that is kept has been sent to workers."""
        return run in self._results

    def send_closed(self, closed: tuple[Closed, ...]) -> None:
        """Sends the results of slices that have just been closed."""
        for key, contributors, _ in closed:
            total = self._totals.pop(key)
            spec = self._specs.pop(key)
            total = sums.scale(total, len(contributors), self._rounds.replicas_to_aggregate)
            result = pb.Result(
                run=key.run,
                exchange=key.exchange,
                slice=key.slice,
                num_slices=spec.num_slices,
                contributors=contributors,
            )
            message = wire.encode(pb.ToWorker(result=result), memoryview(total).cast("B"))
            self._results.setdefault(key.run, []).append(message)
            for worker, outbox in self._streams.items():
                if self._is_near(worker, key.run):
                    outbox.put(message)

    def progress(self, worker: int, progress: Progress) -> None:
        """Acts on a run that a worker has finished."""
        for over in progress.over:
            self._announce(over)
        for run in progress.evicted:
            self._results.pop(run, None)
        self._send_stored(worker, self._rounds.position(worker) + WINDOW_RUNS - 1)

    def _announce(self, over: RunOver) -> None:
        """Tells everybody that a run is over, and whose window has held it that all is sent."""
        both = [
            wire.encode(
                pb.ToWorker(run_over=pb.RunOver(run=over.run, exchanges=over.exchanges, sent=sent))
            )
            for sent in (False, True)
        ]
        for worker, outbox in self._streams.items():
            outbox.put(both[self._is_near(worker, over.run)])

    def _send_stored(self, worker: int, run: int) -> None:
        """Sends a run that has just come into a worker's window."""
        if run < self._rounds.kept_from:
            self._streams.tell(worker, pb.ToWorker(history_gone=pb.HistoryGone(run=run)))
            return
        for message in self._results.get(run, ()):
            self._streams[worker].put(message)
        if run < self._rounds.runs_announced:
            exchanges = self._rounds.exchanges(run)
            over = pb.RunOver(run=run, exchanges=exchanges, sent=True)
            self._streams.tell(worker, pb.ToWorker(run_over=over))

    def _is_near(self, worker: int, run: int) -> bool:
        return run < self._rounds.position(worker) + WINDOW_RUNS
