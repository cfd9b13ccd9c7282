"""A worker's values on their way to the service, and the results on their way back."""

from collections.abc import Callable, Sequence

import numpy as np

from tf_syncdist.errors import ServiceError
from tf_syncdist.propagation.slices import Plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.link import Link, SessionConfig

_DTYPE_NUMBERS = {
    "float32": pb.FLOAT32,
    "float64": pb.FLOAT64,
    "int32": pb.INT32,
    "int64": pb.INT64,
}


class Exchanging(Link):
    """The part of a session that is about rounds."""

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        self._results: dict[tuple[int, int], dict[tuple[int, int], tuple]] = {}
        self._over: list[dict[int, int]] = [{} for _ in config.addresses]
        self._sent: list[set[int]] = [set() for _ in config.addresses]
        self._gone: set[int] = set()
        self._finished = 0

    def exchanges_of(self, run: int) -> int | None:
        """Returns how many exchanges a run had if it is over on every shard, else `None`."""
        with self._changed:
            self._check()
            return self._exchanges_of(run)

    def exchanges_of_missed(self, run: int) -> int:
        """Returns how many exchanges a run had that another worker's state has passed.

        The first shard, which relays the state, has announced the run before, if it had any.
        """
        with self._changed:
            if run in self._over[0]:
                there = f"the end of round {run} on every shard"
                self._wait(lambda: self._exchanges_of(run) is not None, there)
            return self._over[0].get(run, 0)

    def wait_results(self, run: int) -> bool:
        """Waits until the results of a run that is over have all come.

        Returns:
            `False` if they can no longer be had.
        """

        def settled() -> bool:
            return run in self._gone or all(run in sent for sent in self._sent)

        with self._changed:
            self._wait(settled, f"the stored result of round {run}")
            return run not in self._gone

    def send(self, run: int, exchange: int, plan: Plan, arrays: Sequence[np.ndarray]) -> None:
        """Sends this worker's values of an exchange.

        Args:
            run: The run.
            exchange: Number of the exchange in the run.
            plan: How the tensors are cut.
            arrays: The tensors; they may be overwritten as soon as this returns.
        """
        flat = [np.ascontiguousarray(a).reshape(-1) for a in arrays]
        for part in plan.slices:
            header = pb.Contribution(
                run=run,
                exchange=exchange,
                slice=part.index,
                num_slices=plan.num_slices[part.shard],
                dtype=_DTYPE_NUMBERS[part.dtype],
                elements=part.elements,
                layout=plan.layout,
            )
            pieces = [memoryview(flat[p.tensor][p.start : p.stop]).cast("B") for p in part.pieces]
            message = wire.encode(pb.ToAggregator(contribution=header), *pieces)
            self._connections[part.shard].send(message)

    def send_late(self, run: int) -> None:
        """Tells the service that this worker has values for a run which come too late."""
        self._send_all(pb.ToAggregator(late=pb.LateContribution(run=run)))

    def receive(
        self, run: int, exchange: int, plan: Plan, arrays: Sequence[np.ndarray]
    ) -> tuple[int, int] | None:
        """Waits for the result of an exchange and writes it into `arrays`.

        Args:
            run: The run.
            exchange: Number of the exchange in the run.
            plan: How the tensors are cut.
            arrays: Contiguous tensors to fill.

        Returns:
            In how many slices this worker's values are, and how many slices there are; `None` if
            the result can no longer be had.

        Raises:
            ServiceError: If the run had fewer exchanges on the worker that ended it.
        """
        key = (run, exchange)
        wanted = len(plan.slices)

        def known() -> int | None:
            return next((over[run] for over in self._over if run in over), None)

        def there() -> bool:
            come = len(self._results.get(key, ())) >= wanted or run in self._gone
            return come or (known() is not None and exchange >= known())

        with self._changed:
            self._wait(there, f"the result of round {run}")
            slices = self._results.get(key, {})
            if len(slices) < wanted:
                if known() is not None and exchange >= known():
                    raise ServiceError(
                        "Every worker must execute the same exchanges in a run. Expected "
                        f"{known()} of them in run {run}, as the worker had that ended it. "
                        f"Received: one more on worker {self.config.worker}. Run the same program "
                        "everywhere, and let no branch of it depend on the worker."
                    )
                return None
        used = 0
        for part in plan.slices:
            payload, contributors = slices[part.shard, part.index]
            values = np.frombuffer(payload, np.dtype(part.dtype).newbyteorder("<"))
            if values.size != part.elements:
                raise ServiceError(
                    f"Expected {part.elements} values for slice {part.index} of exchange "
                    f"{exchange} in round {run}. Received: {values.size}. Every worker must run "
                    "the same program with the same versions."
                )
            start = 0
            for tensor, first, stop in part.pieces:
                arrays[tensor].reshape(-1)[first:stop] = values[start : start + stop - first]
                start += stop - first
            used += self.config.worker in contributors
        return used, wanted

    def finish(self, run: int, exchanges: int, fate: int) -> None:
        """Tells the service that a run is done and forgets its results."""
        body = pb.RunFinished(run=run, exchanges=exchanges, fate=fate)
        self._send_all(pb.ToAggregator(run_finished=body))
        with self._changed:
            self._finished = run + 1
            for key in [k for k in self._results if k[0] <= run]:
                del self._results[key]
            for over, sent in zip(self._over, self._sent, strict=True):
                over.pop(run, None)
                sent.discard(run)
            self._gone.discard(run)

    # How.

    def _exchanges_of(self, run: int) -> int | None:
        if not all(run in over for over in self._over):
            return None
        return self._over[0][run]

    def _is_over(self, run: int) -> bool:
        return run < self._finished or self._exchanges_of(run) is not None

    def _on_result(self, shard: int, message: pb.Result, payload: memoryview) -> None:
        if message.run >= self._finished:
            slices = self._results.setdefault((message.run, message.exchange), {})
            slices[shard, message.slice] = (payload, tuple(message.contributors))

    def _on_run_over(self, shard: int, message: pb.RunOver, *_: object) -> None:
        if message.run >= self._finished:
            self._over[shard][message.run] = message.exchanges
            if message.sent:
                self._sent[shard].add(message.run)

    def _on_history_gone(self, shard: int, message: pb.HistoryGone, *_: object) -> None:
        self._gone.add(message.run)
