"""A worker's values on their way to the service, and the results on their way back."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tf_syncdist.errors import ServiceError
from tf_syncdist.propagation import rows
from tf_syncdist.propagation.queue import IN_ORDER, Acknowledging, Urgency
from tf_syncdist.propagation.rows import Rows
from tf_syncdist.propagation.slices import ITEM_BYTES, Bucket, Plan, Slice
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.allocator import keep_freed_memory
from tf_syncdist.transport.connection import Made, Outgoing, SliceMessage
from tf_syncdist.transport.copies import copy_in, copy_out, scatter
from tf_syncdist.transport.link import Link
from tf_syncdist.transport.pace import Pace
from tf_syncdist.transport.session_config import SessionConfig

# How the last runs ended can be told again for so many of them; results come at most four ahead.
_MOST_DONE = 8

_DTYPE_NUMBERS = {
    "float32": pb.FLOAT32,
    "float64": pb.FLOAT64,
    "int32": pb.INT32,
    "int64": pb.INT64,
    "float16": pb.FLOAT16,
    "bfloat16": pb.BFLOAT16,
}


class Exchanging(Link):
    """The part of a session that is about rounds.

    Attributes:
        pace: To be told when this worker begins to compute a run.
    """

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        self._results: dict[tuple[int, int], dict[tuple[int, int], tuple]] = {}
        # For a service that is started again: the results of the run in progress and the last one,
        # what was sent in the run in progress, and how the last runs ended.
        self._held: list[dict[int, dict[tuple[int, int], tuple[pb.Result, memoryview]]]] = [
            {} for _ in config.addresses
        ]
        self._offered: list[list[SliceMessage]] = [[] for _ in config.addresses]
        self._awaited_slices: tuple[tuple[int, int], set[tuple[int, int]]] = ((-1, -1), set())
        self._acknowledging = [Acknowledging(config.credit_bytes) for _ in config.addresses]
        self._is_late = False
        self._done: dict[int, tuple[int, int, bool]] = {}
        self._fates = dict.fromkeys((pb.CONTRIBUTED, pb.LATE, pb.REPLAYED, pb.MISSED), 0)
        self._nonfinite = 0
        self._over: list[dict[int, int]] = [{} for _ in config.addresses]
        self._sent: list[set[int]] = [set() for _ in config.addresses]
        self._gone: set[int] = set()
        self._all_withheld: set[int] = set()
        self._finished = 0
        self.pace = Pace()

    def exchanges_of(self, run: int) -> int | None:
        """Returns how many exchanges a run had if it is over on every shard, else `None`."""
        with self._changed:
            self._check()
            return self._exchanges_of(run)

    def wait_over(self, run: int) -> None:
        """Waits until a run is over on every shard."""
        with self._changed:
            self._check()
            self._wait(lambda: self._exchanges_of(run) is not None, f"the end of round {run}")

    def wait_results(self, run: int) -> bool | None:
        """Waits until the results of a run that is over have all come.

        Returns:
            `False` if they can no longer be had, `None` if the run is not over after all: nobody
            is left who has done it.
        """

        def settled() -> bool:
            there = run in self._gone or all(run in sent for sent in self._sent)
            return there or self._exchanges_of(run) is None

        with self._changed:
            self._check()
            self._wait(settled, f"the stored result of round {run}")
            if run not in self._gone and not all(run in sent for sent in self._sent):
                return None
            return run not in self._gone

    def send(
        self,
        run: int,
        exchange: int,
        plan: Plan,
        arrays: Mapping[int, np.ndarray | Rows] | Sequence[np.ndarray | Rows],
        buckets: Sequence[Bucket] | None = None,
    ) -> None:
        """Sends this worker's values of some buckets of an exchange.

        Args:
            run: The run.
            exchange: Number of the exchange in the run.
            plan: How the tensors are cut.
            arrays: The tensors by their numbers, those that travel by rows as `Rows`. They must
                stay as they are until the result has come.
            buckets: What is sent; everything by default.
        """
        buckets = plan.buckets if buckets is None else buckets
        tensors = [t for bucket in buckets for t in bucket.tensors]
        flat: dict[int, np.ndarray | Rows] = {}
        for tensor in tensors:
            array = arrays[tensor]
            if isinstance(array, Rows):
                flat[tensor] = rows.unique(array)
            else:
                flat[tensor] = np.ascontiguousarray(array).reshape(-1)
        for part in (s for bucket in buckets for s in bucket.slices):
            header = pb.Contribution(
                run=run,
                exchange=exchange,
                slice=part.index,
                num_slices=plan.num_slices[part.shard],
                dtype=_DTYPE_NUMBERS[part.dtype],
                elements=part.elements,
                layout=plan.layout,
                priority=part.priority,
                elapsed_seconds=self.pace.elapsed_seconds(run),
            )
            anew: Outgoing = functools.partial(self._inline, header, part, flat)
            lent = None
            if part.row_elements:
                anew = functools.partial(self._table, header, part, flat)
            else:
                lent = self._lend(part.shard, run, exchange, plan.nbytes[part.shard])
            message = anew
            if lent is not None:
                located = pb.Contribution()
                located.CopyFrom(header)
                located.location.segment, data = lent
                located.location.offset = part.offset
                copy_in(part, flat, data[part.offset : part.offset + part.nbytes])
                message = wire.encode(pb.ToAggregator(contribution=located))
            with self._changed:
                urgency = Urgency(run, exchange, part.priority)
                name = f"slice {part.index} of shard {part.shard}"
                offered = SliceMessage(anew, urgency, part.nbytes, name)
                self._offered[part.shard].append(offered)
                if isinstance(message, bytes):
                    make: Callable[[], bytes | None] = Made(message)
                    if self.config.credit_bytes:
                        # It may wait until the run is over without it.
                        make = functools.partial(self._unless_over, run, message)
                    offered = offered._replace(make=make)
                self._post_slice(part.shard, offered)

    def _post_slice(self, shard: int, message: SliceMessage) -> None:
        if not self.config.credit_bytes or message.urgency.priority == IN_ORDER:
            self._post(shard, message)
        elif self._ready[shard]:
            self._connections[shard].send_slice(message)

    def _unless_over(self, run: int, message: bytes) -> bytes | None:
        with self._changed:
            return None if self._is_over(run) else message

    def _inline(
        self, header: pb.Contribution, part: Slice, flat: Mapping[int, np.ndarray]
    ) -> bytes | None:
        """Returns a contribution with its values in the message, unless the run is over."""
        with self._changed:
            if self._is_over(header.run):
                return None
        keep_freed_memory()
        frame: wire.Frame[pb.ToAggregator] = wire.Frame(part.nbytes)
        copy_in(part, flat, frame.payload)
        return frame.seal(pb.ToAggregator(contribution=header))

    def _table(
        self, header: pb.Contribution, part: Slice, flat: Mapping[int, np.ndarray | Rows]
    ) -> bytes | None:
        """Returns a slice of a table as some rows or, if that is smaller, as the whole of it."""
        with self._changed:
            if self._is_over(header.run):
                return None
        ((tensor, start, stop),) = part.pieces
        table = flat[tensor]
        if isinstance(table, Rows):
            first, last = start // part.row_elements, stop // part.row_elements
            table = rows.between(table, first, last)
            if table.nbytes < part.nbytes:
                header.row_elements = part.row_elements
                return wire.encode(pb.ToAggregator(contribution=header), *rows.pack(table))
            table = rows.dense(table, last - first).reshape(-1)
        else:
            table = table[start:stop]
        return wire.encode(pb.ToAggregator(contribution=header), table.view(np.uint8))

    def send_late(self, run: int) -> None:
        """Tells the service that this worker has values for a run which come too late."""
        with self._changed:
            self._is_late = True
            elapsed = self.pace.elapsed_seconds(run)
            late = pb.LateContribution(run=run, elapsed_seconds=elapsed)
            self._send_all(pb.ToAggregator(late=late))

    def receive(
        self,
        run: int,
        exchange: int,
        plan: Plan,
        arrays: Sequence[np.ndarray],
        on_all_withheld: Callable[[], None] | None = None,
        parts: Sequence[Slice] | None = None,
    ) -> tuple[int, int] | None:
        """Waits for the result of an exchange and writes it into `arrays`.

        Args:
            run: The run.
            exchange: Number of the exchange in the run.
            plan: How the tensors are cut.
            arrays: Contiguous tensors to fill.
            on_all_withheld: Given by a worker that keeps its values back; called if nobody else
                contributes either, so that it must.
            parts: What is waited for; everything by default. Results that come in parts are kept
                until the run is finished.

        Returns:
            In how many slices this worker's values are, and how many slices there are; `None` if
            the result can no longer be had.

        Raises:
            ServiceError: If the run had fewer exchanges on the worker that ended it.
        """
        key = (run, exchange)
        left = {(p.shard, p.index): p for p in (plan.slices if parts is None else parts)}
        wanted = len(left)

        def known() -> int | None:
            return next((over[run] for over in self._over if run in over), None)

        def is_asked() -> bool:
            return on_all_withheld is not None and run in self._all_withheld

        # With slices in their hundreds, waking up for each costs more than the slice.
        by_part = bool(self.config.credit_bytes)

        def there() -> bool:
            slices = self._results.get(key, {})
            come = slices.keys() >= left.keys() if by_part else not left.keys().isdisjoint(slices)
            if come or run in self._gone or is_asked():
                return True
            return known() is not None and exchange >= known()

        flat = [a.reshape(-1) for a in arrays]
        used = 0
        while left:
            with self._changed:
                self._awaited_slices = (key, set(left) - set(self._results.get(key, ())))
                self._wait(there, f"the result of round {run}")
                asked = is_asked()
                if asked:
                    self._all_withheld.discard(run)
                    self._is_late = False
            if asked:
                on_all_withheld()
                continue
            with self._changed:
                if run in self._gone:
                    return None
                slices = self._results.get(key, {})
                come = [left.pop(k) for k in list(slices) if k in left]
                if not come:
                    if known() is not None and exchange >= known():
                        raise ServiceError(
                            "Every worker must execute the same exchanges in a run. Expected "
                            f"{known()} of them in run {run}, as the worker had that ended it. "
                            f"Received: one more on worker {self.config.worker}. Run the same "
                            "program everywhere, and let no branch of it depend on the worker."
                        )
                    continue
                found = [slices.pop((part.shard, part.index)) for part in come]
            # What has come is copied while the rest is on its way.
            for part, (payload, contributors, row_elements) in zip(come, found, strict=True):
                if row_elements:
                    scatter(part, payload, flat)
                elif len(payload) != part.nbytes:
                    raise ServiceError(
                        f"Expected {part.nbytes} bytes for slice {part.index} of exchange "
                        f"{exchange} in round {run}. Received: {len(payload)}. Every worker must "
                        "run the same program with the same versions."
                    )
                else:
                    copy_out(part, payload, flat)
                used += self.config.worker in contributors
        with self._changed:
            if parts is not None:
                return used, wanted
            self._results.pop(key, None)
            for lending in self._lending:
                if lending is not None:
                    lending.done(run, exchange)
        return used, wanted

    def finish(self, run: int, exchanges: int, fate: int, nonfinite: bool = False) -> None:
        """Tells the service that a run is done and forgets its results."""
        with self._changed:
            self._fates[fate] += exchanges > 0
            self._nonfinite += nonfinite
            self._done[run] = (exchanges, fate, nonfinite)
            self._done.pop(run - _MOST_DONE, None)
            if exchanges:
                self.pace.forget(run + 1)
            self._forget(run + 1)
            self._send_all(_run_finished(run, exchanges, fate, nonfinite))

    def resume(self, run: int, missed: int) -> None:
        """Goes on from a later run: this worker has taken over another's state.

        Args:
            run: The run.
            missed: How many rounds it has missed by that.
        """
        with self._changed:
            self._fates[pb.MISSED] += missed
            self._done.clear()
            self.pace.forget(run)
            self._forget(run)
            self._send_all(pb.ToAggregator(resume=pb.Resume(run=run, missed=missed)))

    @property
    def counts(self) -> dict[int, int]:
        """How many rounds had which fate on this worker."""
        with self._changed:
            return dict(self._fates)

    # How.

    def _forget(self, run: int) -> None:
        """Forgets what was needed for the runs before one, but for the results of the last."""
        self._finished = run
        self._is_late = False
        for key in [k for k in self._results if k[0] < run]:
            del self._results[key]
        self._gone = {r for r in self._gone if r >= run}
        self._all_withheld = {r for r in self._all_withheld if r >= run}
        for shard, lending in enumerate(self._lending):
            self._offered[shard] = []
            self._over[shard] = {r: n for r, n in self._over[shard].items() if r >= run}
            self._sent[shard] = {r for r in self._sent[shard] if r >= run}
            self._held[shard] = {r: h for r, h in self._held[shard].items() if r >= run - 1}
            if lending is not None:
                lending.done(run - 1)

    def _stand(self, shard: int, standing: pb.Standing) -> None:
        super()._stand(shard, standing)
        standing.run = self._finished
        standing.contributed = self._fates[pb.CONTRIBUTED]
        standing.late = self._fates[pb.LATE]
        standing.replayed = self._fates[pb.REPLAYED]
        standing.missed = self._fates[pb.MISSED]
        standing.nonfinite = self._nonfinite
        for run in sorted({*self._held[shard], *self._done}):
            exchanges, fate, _ = self._done.get(run, (0, pb.MISSED, False))
            slices = self._held[shard].get(run, {})
            done = run < self._finished
            if done and (fate == pb.MISSED or (exchanges and not slices)):
                continue
            held = standing.held.add(run=run, done=done, exchanges=exchanges)
            for exchange, part in slices:
                held.slices.add(exchange=exchange, slice=part)

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        super()._resend(shard, welcome, is_new)
        self._acknowledging[shard] = Acknowledging(self.config.credit_bytes)
        if is_new:
            # It says again which runs are over, if it knows.
            self._over[shard].clear()
            self._sent[shard].clear()
            self._gone.clear()
        if welcome.void:
            # Another worker's state takes the place of what this run makes of its results.
            self._gone.add(self._finished)
            self._results.clear()
            self._held[shard].clear()
        first = max(welcome.run, min(self._done, default=self._finished))
        if welcome.run < min(first, self._finished):
            resume = pb.Resume(run=min(first, self._finished))
            self._send(shard, pb.ToAggregator(resume=resume))
        for run in range(first, self._finished):
            self._send(shard, _run_finished(run, *self._done[run]))
        for offered in self._offered[shard]:
            self._post_slice(shard, offered)
        if self._is_late:
            late = pb.LateContribution(run=self._finished)
            self._send(shard, pb.ToAggregator(late=late))

    def _on_want_result(self, shard: int, message: pb.WantResult, *_: object) -> None:
        held = self._held[shard].get(message.run, {}).get((message.exchange, message.slice))
        if held is not None:
            result = pb.Result()
            result.CopyFrom(held[0])
            result.ClearField("location")
            stored = wire.encode(pb.ToAggregator(stored_result=result), held[1])
            self._connections[shard].send(stored)

    def _exchanges_of(self, run: int) -> int | None:
        if not all(run in over for over in self._over):
            return None
        return self._over[0][run]

    def _is_over(self, run: int) -> bool:
        return run < self._finished or self._exchanges_of(run) is not None

    def _on_result(self, shard: int, message: pb.Result, payload: memoryview) -> bool:
        if self.config.timeline is not None:
            self._record(shard, message)
        if self.config.credit_bytes:
            nbytes = message.elements * ITEM_BYTES[pb.DataType.Name(message.dtype).lower()]
            arrived = self._acknowledging[shard].arrived(nbytes)
            if arrived:
                self._send(shard, pb.ToAggregator(ack=pb.Ack(bytes=arrived)))
        if message.run >= self._finished:
            slices = self._results.setdefault((message.run, message.exchange), {})
            if message.HasField("location"):
                payload = self._opened[shard].read(message.location, message.bytes)
            held = self._held[shard]
            held.setdefault(message.run, {})[message.exchange, message.slice] = (message, payload)
            if set(self._members) <= set(message.contributors):
                # All have done the last run, so nobody can miss its results any more.
                self._held[shard] = {r: h for r, h in held.items() if r >= message.run}
            slices[shard, message.slice] = (
                payload,
                tuple(message.contributors),
                message.row_elements,
            )
        if not self.config.credit_bytes:
            return True
        awaited, missing = self._awaited_slices
        if awaited != (message.run, message.exchange):
            return False
        missing.discard((shard, message.slice))
        return not missing

    def _record(self, shard: int, message: pb.Result) -> None:
        """Adds a result to the timeline, as far as a worker can tell."""
        timeline, now = self.config.timeline, time.monotonic()
        name = f"slice {message.slice} of shard {shard}"
        args = {
            "run": message.run,
            "exchange": message.exchange,
            "priority": message.priority,
            "bytes": message.bytes,
            "contributors": list(message.contributors),
        }
        began = self._connections[shard].reading_since
        timeline.record(name, "sum", began - message.sum_seconds, began, args=args)
        timeline.record(name, "pull", began, now, args=args)

    def _on_run_over(self, shard: int, message: pb.RunOver, *_: object) -> None:
        if message.run >= self._finished:
            self._over[shard][message.run] = message.exchanges
            if message.sent:
                self._sent[shard].add(message.run)

    def _on_all_withheld(self, shard: int, message: pb.AllWithheld, *_: object) -> None:
        if message.run >= self._finished:
            self._all_withheld.add(message.run)

    def _on_history_gone(self, shard: int, message: pb.HistoryGone, *_: object) -> None:
        self._gone.add(message.run)


def _run_finished(run: int, exchanges: int, fate: int, nonfinite: bool) -> pb.ToAggregator:
    body = pb.RunFinished(run=run, exchanges=exchanges, fate=fate, nonfinite=int(nonfinite))
    return pb.ToAggregator(run_finished=body)
