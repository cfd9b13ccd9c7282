"""A worker's side of the job: what it has received so far, and waits with deadlines on it."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import ModelMismatchError, ServiceError, SyncDistError, WaitTimeoutError
from tf_syncdist.propagation.slices import Plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.connection import Connection

_DTYPE_NUMBERS = {
    "float32": pb.FLOAT32,
    "float64": pb.FLOAT64,
    "int32": pb.INT32,
    "int64": pb.INT64,
}
_CHUNK_BYTES = 2**20

# A receiver of state waits this long before it asks again, so that a worker which is always far
# behind does not keep the others busy (rule 9 of docs/semantics.md).
_STATE_PAUSE_SECONDS = 30.0


class SessionConfig(NamedTuple):
    """What a worker tells the service about itself and the job.

    Args:
        addresses: Address of every shard; the first one decides.
        worker: Index of this worker.
        num_workers: How many workers the job has.
        cutoff: The cutoff policy, serialized.
        history_rounds: See `SyncReplicasStrategy`.
        history_bytes: See `SyncReplicasStrategy`.
        connect_timeout_seconds: How long to wait for the service to answer.
        timeout_seconds: How long to wait for other workers.
    """

    addresses: tuple[str, ...]
    worker: int
    num_workers: int
    cutoff: str
    history_rounds: int = 4
    history_bytes: int = 512 * 2**20
    connect_timeout_seconds: float = 30.0
    timeout_seconds: float = 600.0


class State(NamedTuple):
    """Variables of another worker, as they are before run `run`."""

    run: int
    values: list[np.ndarray]


class _Incoming:
    """Variables that are being received."""

    def __init__(self, run: int, num_variables: int) -> None:
        self.run = run
        self.buffers: list[bytearray | None] = [None] * num_variables
        self.missing: int | None = None

    def add(self, chunk: pb.StateChunk, payload: memoryview) -> None:
        buffer = self.buffers[chunk.variable]
        if buffer is None:
            buffer = self.buffers[chunk.variable] = bytearray(chunk.total)
        buffer[chunk.offset : chunk.offset + payload.nbytes] = payload
        last = chunk.variable + 1 == chunk.num_variables
        if last and chunk.offset + payload.nbytes == chunk.total:
            self.missing = 0


class Session:
    """Everything a strategy needs from the service.

    Methods that wait take no timeout of their own: the session's deadline applies, and `cancel`
    wakes every wait from another thread. A message for the user goes to `on_notice`.

    Args:
        config: See `SessionConfig`.
        on_notice: Called with one line.

    Attributes:
        on_state_request: If set, called during waits in which this worker holds a state that it
            can give, when another one has asked for it.

    Raises:
        AggregatorUnreachableError: If a shard does not answer in time.
        ServiceError: If the service refuses the worker.
    """

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        self.config = config
        self._on_notice = on_notice
        self._changed = threading.Condition()
        self._results: dict[tuple[int, int], dict[tuple[int, int], tuple]] = {}
        self._over: list[dict[int, int]] = [{} for _ in config.addresses]
        self._sent: list[set[int]] = [set() for _ in config.addresses]
        self._epochs: dict[int, memoryview] = {}
        self._verdicts: dict[int, str] = {}
        self._incoming: dict[int, _Incoming] = {}
        self._received: State | None = None
        self._gone: set[int] = set()
        self._give: list[int] = []
        self._job_over: tuple[int, int] | None = None
        self._all_gone = 0
        self._error: Exception | None = None
        self._finished = 0
        self._asked_at = -_STATE_PAUSE_SECONDS
        self.on_state_request: Callable[[], None] | None = None
        self._connections: list[Connection] = []
        incarnation = random.SystemRandom().getrandbits(63)
        for shard, address in enumerate(config.addresses):
            hello = pb.Hello(
                protocol=wire.PROTOCOL,
                worker=config.worker,
                incarnation=incarnation,
                num_workers=config.num_workers,
                cutoff=config.cutoff,
                shard=shard,
                num_shards=len(config.addresses),
                history_rounds=config.history_rounds,
                history_bytes=config.history_bytes,
            )
            try:
                connection = Connection(
                    address,
                    hello,
                    lambda header, payload, shard=shard: self._receive(shard, header, payload),
                    self.cancel,
                    config.connect_timeout_seconds,
                )
            except BaseException:
                self.close()
                raise
            self._connections.append(connection)
        self.job_seed = self._connections[0].welcome.job_seed

    # What is known without waiting.

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

    def job_over_at(self) -> tuple[int, int] | None:
        """Returns the run from which the job is over and the worker that said so, or `None`."""
        with self._changed:
            return self._job_over

    def take_state_requests(self) -> list[int]:
        """Returns requests for this worker's state, each of them once."""
        with self._changed:
            requests, self._give = self._give, []
            return requests

    # Rounds.

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
        """
        key = (run, exchange)
        wanted = len(plan.slices)

        def there() -> bool:
            return len(self._results.get(key, ())) >= wanted or run in self._gone

        with self._changed:
            self._wait(there, f"the result of round {run}")
            slices = self._results.get(key, {})
            if len(slices) < wanted:
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

    def exchange_epoch(self, run: int, layout: int, values: np.ndarray) -> np.ndarray:
        """Sums values over the workers after `run` runs.

        Args:
            run: How many runs this worker has done.
            layout: Fingerprint of what the values are.
            values: float64 vector.

        Returns:
            The sum; the same bytes on every worker.
        """
        header = pb.ToAggregator(epoch=pb.EpochContribution(run=run, layout=layout))
        self._connections[0].send(wire.encode(header, memoryview(values).cast("B")))
        with self._changed:
            what = f"the metrics after run {run}"
            self._wait(lambda: run in self._epochs, what, gives_state=True)
            payload = self._epochs.pop(run)
            for old in [r for r in self._epochs if r < run]:
                del self._epochs[old]
        total = np.frombuffer(payload, "<f8")
        if total.size != values.size:
            raise ServiceError(f"Expected {values.size} metric values. Received: {total.size}.")
        return total

    # State.

    def agree(self, run: int, variables: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
        """Waits until every worker is about to train the same variables.

        Args:
            run: The run before which they are synchronised.
            variables: Name, dtype and shape of every variable.

        Raises:
            ModelMismatchError: If they differ between workers.
        """
        specs = [pb.VariableSpec(name=n, dtype=d, shape=s) for n, d, s in variables]
        manifest = pb.Manifest(run=run, variables=specs)
        self._connections[0].send(wire.encode(pb.ToAggregator(manifest=manifest)))
        with self._changed:
            what = "all workers to have built their models"
            self._wait(lambda: run in self._verdicts, what, gives_state=True)
            error = self._verdicts.pop(run)
        if error:
            raise ModelMismatchError(error)

    def give_state(self, request: int, run: int, values: Sequence[np.ndarray]) -> None:
        """Sends this worker's variables as they are before run `run`.

        Args:
            request: 0 for the start, else the request that this answers.
            run: The run.
            values: The variables.
        """
        for index, value in enumerate(values):
            # As bytes, since NumPy gives no buffer of bfloat16.
            data = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            for offset in range(0, max(1, data.nbytes), _CHUNK_BYTES):
                chunk = pb.StateChunk(
                    request=request,
                    run=run,
                    variable=index,
                    num_variables=len(values),
                    offset=offset,
                    total=data.nbytes,
                )
                piece = data[offset : offset + _CHUNK_BYTES]
                message = wire.encode(pb.ToAggregator(state_chunk=chunk), piece)
                self._connections[0].send(message)

    def receive_state(self, specs: Sequence[tuple[str, str, tuple[int, ...]]]) -> State:
        """Waits for variables that were asked for, or that worker 0 gives at the start."""
        with self._changed:
            self._wait(
                lambda: (
                    any(self._verdicts.values())
                    or any(i.missing == 0 for i in self._incoming.values())
                ),
                "the variables of an up-to-date worker",
            )
            if any(self._verdicts.values()):
                raise ServiceError(next(filter(None, self._verdicts.values())))
            request, incoming = next((r, i) for r, i in self._incoming.items() if i.missing == 0)
            del self._incoming[request]
        values = []
        for buffer, (name, dtype, shape) in zip(incoming.buffers, specs, strict=True):
            value = np.frombuffer(buffer or b"", dtype)
            if value.size != int(np.prod(shape)):
                raise ServiceError(
                    f"Expected {shape} values for {name}. Received: {value.size} of them."
                )
            values.append(value.reshape(shape))
        return State(incoming.run, values)

    def request_state(self, run: int) -> None:
        """Asks for the state of an up-to-date worker, at most every 30 s."""
        with self._changed:
            until = self._asked_at + _STATE_PAUSE_SECONDS
            while time.monotonic() < until:
                self._check()
                self._changed.wait(until - time.monotonic())
            self._asked_at = time.monotonic()
        self._send_all(pb.ToAggregator(state_request=pb.StateRequest(run=run)))

    # The end.

    def goodbye(self, reason: int, run: int) -> None:
        """Tells the service that this worker does no more runs."""
        self._send_all(pb.ToAggregator(goodbye=pb.Goodbye(reason=reason, run=run)))

    def wait_all_gone(self, timeout_seconds: float, on_wake: Callable[[], None]) -> bool:
        """Waits until every worker has said goodbye; `on_wake` is called now and then."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            on_wake()
            with self._changed:
                if self._all_gone or self._error is not None:
                    return bool(self._all_gone)
                self._changed.wait(0.2)
        return False

    def report(self) -> pb.ReportReply:
        """Asks the first shard for the job's counters."""
        return self._connections[0].report()

    @property
    def has_failed(self) -> bool:
        """Whether the connection to the service was lost or cancelled."""
        with self._changed:
            return self._error is not None

    def cancel(self, error: Exception) -> None:
        """Makes every wait, now and later, raise `error`."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the streams. May be called twice."""
        self.cancel(SyncDistError("The session is closed."))
        for connection in self._connections:
            connection.close()

    # How.

    def _exchanges_of(self, run: int) -> int | None:
        if not all(run in over for over in self._over):
            return None
        return self._over[0][run]

    def _send_all(self, message: pb.ToAggregator) -> None:
        data = wire.encode(message)
        for connection in self._connections:
            connection.send(data)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(self, there: Callable[[], bool], what: str, gives_state: bool = False) -> None:
        deadline = time.monotonic() + self.config.timeout_seconds
        while not there():
            self._check()
            if gives_state and self._give and self.on_state_request is not None:
                # What this wait is for may need the worker that asks.
                self._changed.release()
                try:
                    self.on_state_request()
                finally:
                    self._changed.acquire()
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(
                    f"Worker {self.config.worker} waited {self.config.timeout_seconds:g} s for "
                    f"{what}, as long as `timeout_seconds` allows. Look at the logs of the other "
                    "workers, or raise it if their steps are really that slow."
                )
            self._changed.wait(min(left, 5.0))

    def _receive(self, shard: int, header: pb.ToWorker, payload: memoryview) -> None:
        body = header.WhichOneof("body")
        if body == "notice":
            self._on_notice(header.notice.text)
            return
        message = getattr(header, body)
        with self._changed:
            if body == "result":
                if message.run >= self._finished:
                    slices = self._results.setdefault((message.run, message.exchange), {})
                    slices[shard, message.slice] = (payload, tuple(message.contributors))
            elif body == "run_over":
                if message.run >= self._finished:
                    self._over[shard][message.run] = message.exchanges
                    if message.sent:
                        self._sent[shard].add(message.run)
            elif body == "epoch_result":
                self._epochs[message.run] = payload
            elif body == "manifest_verdict":
                self._verdicts[message.run] = message.error
            elif body == "state_chunk":
                self._add_chunk(message, payload)
            elif body == "give_state":
                self._give.append(message.request)
            elif body == "history_gone":
                self._gone.add(message.run)
            elif body == "job_over":
                self._job_over = (message.run, message.worker)
            elif body == "all_gone":
                self._all_gone += 1
            self._changed.notify_all()

    def _add_chunk(self, chunk: pb.StateChunk, payload: memoryview) -> None:
        incoming = self._incoming.get(chunk.request)
        if incoming is None:
            incoming = self._incoming[chunk.request] = _Incoming(chunk.run, chunk.num_variables)
        incoming.add(chunk, payload)
