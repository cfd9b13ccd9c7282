"""Sums of contributions on their way to the workers: who is sent which result when."""

import collections

from tf_syncdist.aggregation import sums
from tf_syncdist.aggregation.memory import Block, ResultMemory
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.aggregation.records import Closed, Progress, RoundError, RunOver, SliceKey
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.aggregation.slots import Slot, StoredSlot
from tf_syncdist.aggregation.tables import TableSlot
from tf_syncdist.propagation.queue import Urgency
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# Results travel to a worker up to this many runs ahead of it, so that a replay finds the next
# result there already, while a worker that is stuck does not pile up the job's history.
WINDOW_RUNS = 4

_LAST = 2**32


class Delivery:
    """Keeps sums and results, and sends results to every worker within its window.

    A slice goes through `claim`, `settle` for every claim, and `close`; when all of that has
    happened it is one of the `next_ready`, has to be finished, and is then to be published. Only
    adding and finishing happen without the job's lock.

    Args:
        streams: The connected workers.
        rounds: Decides what is added, closed and kept.
        memory: Shared memory for results.
        in_order: Whether sums are made in the order of the workers.
    """

    def __init__(
        self, streams: Streams, rounds: Rounds, memory: ResultMemory, in_order: bool
    ) -> None:
        self._streams = streams
        self._rounds = rounds
        self._memory = memory
        self._in_order = in_order
        self._slots: dict[SliceKey, Slot | TableSlot] = {}
        self._ready: collections.deque[Slot | TableSlot] = collections.deque()
        self._closed_runs: set[int] = set()
        self._results: dict[int, list[Slot | TableSlot | StoredSlot]] = {}
        # Blocks of runs that are no longer kept, and the workers that may be reading them.
        self._lingering: list[tuple[int, set[int], list[Block]]] = []

    def check(self, key: SliceKey, message: pb.Contribution, worker: int) -> None:
        """Checks what the rounds do not look at.

        Raises:
            RoundError: If workers disagree about the rows of a slice.
        """
        slot = self._slots.get(key)
        agreed = slot.row_elements if isinstance(slot, TableSlot) else 0
        if agreed and message.row_elements not in (0, agreed):
            raise RoundError(
                f"Expected rows of {agreed} elements in slice {key.slice} of run {key.run}, as "
                f"another worker sent. Received: rows of {message.row_elements} from worker "
                f"{worker}. Build the same model on every worker."
            )

    def claim(self, key: SliceKey, message: pb.Contribution) -> Slot | TableSlot:
        """Returns where values are to be added that were accepted for a slice."""
        slot = self._slots.get(key)
        if slot is None and message.row_elements:
            slot = self._slots[key] = TableSlot(message, self._in_order)
        if slot is None:
            block = None
            if any(outbox.opened is not None for outbox in self._streams.values()):
                nbytes = message.elements * sums.DTYPES[message.dtype][0].itemsize
                block = self._memory.take(nbytes, message.num_slices)
            slot = Slot(message, block, self._rounds.num_workers, self._in_order)
            self._slots[key] = slot
        slot.claims += 1
        return slot

    def is_turn(self, worker: int, key: SliceKey) -> bool:
        """Returns whether all values of a slice have been added that come before a worker's."""
        slot = self._slots.get(key)
        added = slot.added if slot is not None else ()
        return all(w in added for w in self._rounds.to_come(key.run) if w < worker)

    def settle(self, slot: Slot | TableSlot, worker: int) -> None:
        """Takes note that a worker's values have been added."""
        slot.claims -= 1
        slot.added.add(worker)
        if slot.closed is not None and not slot.claims:
            self._ready.append(slot)

    def close(self, closed: tuple[Closed, ...]) -> None:
        """Takes note that nothing more is accepted for slices."""
        for one in closed:
            slot = self._slots.pop(one.key)
            slot.closed = one
            self._closed_runs.add(one.key.run)
            if not slot.claims:
                self._ready.append(slot)

    def next_ready(self) -> Slot | TableSlot | None:
        """Returns a slice that is to be finished and published."""
        return self._ready.popleft() if self._ready else None

    def publish(self, slot: Slot | TableSlot) -> None:
        """Sends the result of a slice."""
        run = slot.closed.key.run
        self._results.setdefault(run, []).append(slot)
        for worker, outbox in self._streams.items():
            if self._is_near(worker, run):
                outbox.put_result(slot.result(outbox.opened or ()), slot.urgency, slot.nbytes)

    def closed(self, run: int) -> bool:
        """Returns whether any slice of a run that is kept is closed."""
        return run in self._closed_runs

    def progress(self, worker: int, progress: Progress) -> None:
        """Acts on a run that a worker has finished."""
        for over in progress.over:
            self._announce(over)
        for run in progress.evicted:
            self._forget(run)
        self._release(worker, self._rounds.position(worker))
        self._send_stored(worker, self._rounds.position(worker) + WINDOW_RUNS - 1)

    def leave(self, worker: int) -> None:
        """Takes note that a worker reads no results any more."""
        self._release(worker, None)

    def catch_up(self, worker: int) -> None:
        """Sends everything in its window to a worker that has connected anew."""
        position = self._rounds.position(worker)
        if position < self._rounds.kept_from:
            self._streams.tell(worker, pb.ToWorker(history_gone=pb.HistoryGone(run=position)))
        for run in range(max(position, self._rounds.kept_from), position + WINDOW_RUNS):
            self._send_stored(worker, run)
        beyond = max(position + WINDOW_RUNS, self._rounds.kept_from)
        for run in range(beyond, self._rounds.runs_announced):
            over = pb.RunOver(run=run, exchanges=self._rounds.exchanges(run))
            self._streams.tell(worker, pb.ToWorker(run_over=over))

    def resumed(self, worker: int) -> None:
        """Takes note that a worker goes on from a later run."""
        self._release(worker, self._rounds.position(worker))
        self.catch_up(worker)

    def restore(self, run: int, result: pb.Result, payload: memoryview) -> None:
        """Takes a result over from a worker that has it."""
        self._results.setdefault(run, []).append(StoredSlot(result, payload))
        self._closed_runs.add(run)

    def _announce(self, over: RunOver) -> None:
        """Tells everybody that a run is over, and whose window has held it that all is sent."""
        both = [
            wire.encode(
                pb.ToWorker(run_over=pb.RunOver(run=over.run, exchanges=over.exchanges, sent=sent))
            )
            for sent in (False, True)
        ]
        for worker, outbox in self._streams.items():
            if self._rounds.position(worker) <= over.run:
                is_near = self._is_near(worker, over.run)
                if outbox.by_urgency or not is_near:
                    # Who is computing for it is to know before the results have come.
                    outbox.put(both[False])
                if is_near:
                    outbox.put_result(both[True], _behind(over.run), 0)

    def _send_stored(self, worker: int, run: int) -> None:
        """Sends a run that has just come into a worker's window."""
        if run < self._rounds.kept_from:
            self._streams.tell(worker, pb.ToWorker(history_gone=pb.HistoryGone(run=run)))
            return
        outbox = self._streams[worker]
        for slot in self._results.get(run, ()):
            outbox.put_result(slot.result(outbox.opened or ()), slot.urgency, slot.nbytes)
        if run < self._rounds.runs_announced:
            exchanges = self._rounds.exchanges(run)
            over = pb.RunOver(run=run, exchanges=exchanges, sent=True)
            outbox.put_result(wire.encode(pb.ToWorker(run_over=over)), _behind(run), 0)

    def _is_near(self, worker: int, run: int) -> bool:
        return run < self._rounds.position(worker) + WINDOW_RUNS

    def _forget(self, run: int) -> None:
        self._closed_runs.discard(run)
        blocks = [slot.block for slot in self._results.pop(run, ()) if slot.block is not None]
        readers = {
            worker
            for worker, outbox in self._streams.items()
            if outbox.opened is not None
            and self._rounds.position(worker) <= run
            and self._is_near(worker, run)
        }
        self._lingering.append((run, readers, blocks))
        self._release(-1, None)

    def _release(self, worker: int, position: int | None) -> None:
        """Uses the blocks again that were kept for a worker, now at a position or gone."""
        kept = []
        for run, readers, blocks in self._lingering:
            if position is None or position > run:
                readers.discard(worker)
            if readers:
                kept.append((run, readers, blocks))
                continue
            for block in blocks:
                self._memory.give_back(block)
        self._lingering = kept


def _behind(run: int) -> Urgency:
    """Returns the urgency of what stands behind all results of a run."""
    return Urgency(run, _LAST, _LAST)
