"""One worker's streams to all shards: what arrives wakes waits, and every wait has a deadline."""

import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import ServiceError, SyncDistError, WaitTimeoutError
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.connection import Connection
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials
from tf_syncdist.transport.memory import Lending, Opened
from tf_syncdist.transport.segments import SegmentError, host_id

# Without an answer in this time, and until it comes, values travel in the messages.
_ANSWER_SECONDS = 2.0


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
        transport: "auto", "grpc" or "shared_memory"; see `SyncReplicasStrategy`.
        deterministic: See `SyncReplicasStrategy`.
        credentials: What it shows to the service, and demands of it.
    """

    addresses: tuple[str, ...]
    worker: int
    num_workers: int
    cutoff: str
    history_rounds: int = 4
    history_bytes: int = 512 * 2**20
    connect_timeout_seconds: float = 30.0
    timeout_seconds: float = 600.0
    transport: str = "auto"
    deterministic: bool = False
    credentials: Credentials = NO_CREDENTIALS


class Link:
    """What all parts of a session stand on.

    A part keeps what it has received in attributes that `_changed` guards. A message is handed to
    the method `_on_<body>`, which is called with `_changed` held and must not wait.

    Args:
        config: See `SessionConfig`.
        on_notice: Called with one line.
    """

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        self.config = config
        self.on_state_request: Callable[[], None] | None = None
        self._on_notice = on_notice
        self._changed = threading.Condition()
        self._give: list[int] = []
        self._error: Exception | None = None
        self._connections: list[Connection] = []
        self._open = False
        self._lending: list[Lending | None] = [None for _ in config.addresses]
        self._opened = [Opened() for _ in config.addresses]
        self._told_of_memory = False
        self._patience = _ANSWER_SECONDS
        # What one shard has had answered before all of them are there.
        self._early: list[tuple[int | None, bytes]] = []

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
        for memory in (*self._lending, *self._opened):
            if memory is not None:
                memory.close()

    # How.

    def _connect(self) -> None:
        """Opens the streams; messages are handled from then on."""
        config = self.config
        incarnation = random.SystemRandom().getrandbits(63)
        host = "" if config.transport == "grpc" else host_id()
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
                host=host,
                deterministic=config.deterministic,
            )
            try:
                connection = Connection(
                    address,
                    hello,
                    lambda header, payload, shard=shard: self._receive(shard, header, payload),
                    self.cancel,
                    config.connect_timeout_seconds,
                    config.credentials,
                )
            except BaseException:
                self.close()
                raise
            self._connections.append(connection)
            self._share_memory(shard, connection)
        with self._changed:
            self._open = True
            for shard, data in self._early:
                self._send_to(shard, data)
        self.job_seed = self._connections[0].welcome.job_seed

    def _share_memory(self, shard: int, connection: Connection) -> None:
        if connection.welcome.host:
            self._lending[shard] = Lending(lambda m: connection.send(wire.encode(m)))
        elif self.config.transport == "shared_memory":
            self.close()
            raise ServiceError(
                "Expected the aggregation service to run on the same machine, as the same user and "
                'in the same process namespace, because transport="shared_memory" was given. '
                f"Received: one at {connection.address} that does not. Leave `transport` out."
            )

    def _without_memory(self, why: str) -> None:
        """Goes on over gRPC, or fails if that was not wanted."""
        if self.config.transport == "shared_memory":
            self.cancel(
                ServiceError(
                    "Expected memory that is shared with the aggregation service, because "
                    f'transport="shared_memory" was given. Received: {why}. Leave `transport` out.'
                )
            )
        elif not self._told_of_memory:
            self._told_of_memory = True
            self._on_notice(
                f"worker {self.config.worker} shares no memory with the service ({why}); "
                "gradients travel over gRPC"
            )

    def _lend(
        self, shard: int, run: int, exchange: int, nbytes: int
    ) -> tuple[int, np.ndarray] | None:
        """Returns memory for an exchange's values, if the service reads them there."""
        with self._changed:
            lending = self._lending[shard]
            if lending is None:
                return None
            if not lending.is_lent(run, exchange):
                try:
                    if not self._changed.wait_for(lambda: lending.prepare(nbytes), self._patience):
                        self._patience = 0.0
                except SegmentError as e:
                    self._without_memory(str(e))
            return lending.lend(run, exchange, nbytes)

    def _on_segment(self, shard: int, message: pb.Segment, *_: object) -> None:
        answer = pb.SegmentAnswer(id=message.id)
        try:
            self._opened[shard].open(message)
        except SegmentError as e:
            answer.error = str(e)
            self._without_memory(str(e))
        self._send(shard, pb.ToAggregator(segment_answer=answer))

    def _on_segment_answer(self, shard: int, message: pb.SegmentAnswer, *_: object) -> None:
        if message.error:
            self._without_memory(message.error)
        if self._lending[shard] is not None:
            self._lending[shard].answered(message)

    def _send_first(self, message: pb.ToAggregator, *pieces: bytes | memoryview) -> None:
        """Tells something to the shard that decides."""
        self._connections[0].send(wire.encode(message, *pieces))

    def _send_all(self, message: pb.ToAggregator) -> None:
        self._send(None, message)

    def _send(self, shard: int | None, message: pb.ToAggregator) -> None:
        """Tells something to a shard, or to all."""
        data = wire.encode(message)
        with self._changed:
            if not self._open:
                self._early.append((shard, data))
                return
        self._send_to(shard, data)

    def _send_to(self, shard: int | None, data: bytes) -> None:
        for connection in self._connections if shard is None else [self._connections[shard]]:
            connection.send(data)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(
        self,
        there: Callable[[], bool],
        what: str,
        gives_state: Callable[[], bool] = lambda: False,
    ) -> None:
        """Waits, with `_changed` held, and lets go of it meanwhile.

        Args:
            there: Whether what is waited for has come.
            what: What that is, for the error.
            gives_state: Whether this worker's variables are at rest, so that others can have them.

        Raises:
            WaitTimeoutError: If it does not come in time.
        """
        deadline = time.monotonic() + self.config.timeout_seconds
        while not there():
            self._check()
            if self._give and self.on_state_request is not None and gives_state():
                # What this wait is for may need the worker that asks.
                asked = list(self._give)
                self._changed.release()
                try:
                    self.on_state_request()
                finally:
                    self._changed.acquire()
                if self._give != asked:
                    continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(
                    f"Worker {self.config.worker} waited {self.config.timeout_seconds:g} s for "
                    f"{what}, as long as `timeout_seconds` allows. Look at the logs of the other "
                    "workers, or raise it if their steps are really that slow."
                )
            self._changed.wait(min(left, 5.0))

    def _on_give_state(self, shard: int, message: pb.GiveState, *_: object) -> None:
        self._give.append(message.request)

    def _receive(self, shard: int, header: pb.ToWorker, payload: memoryview) -> None:
        body = header.WhichOneof("body")
        if body == "notice":
            self._on_notice(header.notice.text)
            return
        with self._changed:
            getattr(self, f"_on_{body}")(shard, getattr(header, body), payload)
            self._changed.notify_all()
