"""One worker's streams to all shards: what arrives wakes waits, and every wait has a deadline."""

import functools
import random
import threading
import time
from collections.abc import Callable

import grpc
import numpy as np

from tf_syncdist.errors import (
    AggregatorUnreachableError,
    ServiceError,
    SyncDistError,
    WaitTimeoutError,
)
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.connection import Connection, Outgoing
from tf_syncdist.transport.heartbeat import Heartbeat
from tf_syncdist.transport.limiter import Limiter
from tf_syncdist.transport.memory import Lending, Opened
from tf_syncdist.transport.segments import SegmentError, host_id
from tf_syncdist.transport.session_config import SessionConfig

# Without an answer in this time, and until it comes, values travel in the messages.
_ANSWER_SECONDS = 2.0

# A heartbeat has a connection of its own, which may be there so much later than the stream.
_NEW_SECONDS = 3.0

# Whoever cannot be reached now may be reached later.
_PASSING = {
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ALREADY_EXISTS,
}


class Link:
    """What all parts of a session stand on.

    A part keeps what it has received in attributes that `_changed` guards. A message is handed to
    the method `_on_<body>`, which is called with `_changed` held and must not wait. It may return
    `False` if that cannot end any wait.

    Where a stream breaks it is opened anew, perhaps to another process that knows nothing. A part
    then tells by `_stand` what it knows of the job, and by `_resend` says again what it has said
    and nobody has answered. What is said meanwhile is dropped; it has to be said by `_resend`.

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
        self._incarnation = random.SystemRandom().getrandbits(63)
        self._connections: list[Connection] = []
        self._limiters = (Limiter(config.limit_gbps), Limiter(config.limit_gbps))
        self._ready = [False for _ in config.addresses]
        self._welcomes: list[pb.Welcome | None] = [None for _ in config.addresses]
        # By which each shard knows its own workers again.
        self._shard_seeds = [0 for _ in config.addresses]
        self._down_since: list[float | None] = [None for _ in config.addresses]
        self._welcomed_at = [0.0 for _ in config.addresses]
        self._leaving = False
        self._members: tuple[int, ...] = ()
        self._first_welcome = pb.Welcome()
        self._served_at: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self._heartbeats: list[Heartbeat] = []
        self._lending: list[Lending | None] = [None for _ in config.addresses]
        self._opened = [Opened() for _ in config.addresses]
        # Memory of streams that have broken; what was read of it may still be in use.
        self._former: list[Lending | Opened] = []
        self._told_of_memory = False
        self._patience = _ANSWER_SECONDS

    def report(self) -> pb.ReportReply:
        """Asks the first shard for the job's counters."""
        return self._connections[0].report()

    @property
    def came_again(self) -> pb.EpochBegun | None:
        """The job's epoch, if another process of this worker was there before; else `None`."""
        with self._changed:
            return self._first_welcome.epoch if self._first_welcome.again else None

    @property
    def served_at(self) -> tuple[dict[int, str], dict[int, str]]:
        """Where workers serve their models: those that take part, and those that are done."""
        with self._changed:
            return self._served_at

    @property
    def has_failed(self) -> bool:
        """Whether the connection to the service was lost or cancelled."""
        with self._changed:
            return self._error is not None

    def check(self) -> None:
        """Raises what has ended the connection, if anything has."""
        with self._changed:
            self._check()

    @property
    def limit_gbps(self) -> float:
        """How many gigabits per second may pass in each direction; 0 for no limit."""
        return self._limiters[0].gbps

    def limit(self, gbps: float) -> None:
        """Lets so much pass in each direction from now on; 0 for no limit."""
        for limiter in self._limiters:
            limiter.limit(gbps)

    def cancel(self, error: Exception) -> None:
        """Makes every wait, now and later, raise `error`."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the streams. May be called twice."""
        self.cancel(SyncDistError("The session is closed."))
        for heartbeat in self._heartbeats:
            heartbeat.close()
        for connection in self._connections:
            connection.close()
        for memory in (*self._lending, *self._opened, *self._former):
            if memory is not None:
                memory.close()
        if self.config.timeline is not None:
            try:
                self.config.timeline.close()
            except OSError as e:
                self._on_notice(f"the timeline could not be written: {e}")

    # Connecting.

    def _connect(self) -> None:
        """Opens the streams; messages are handled from then on."""
        config = self.config
        for shard, address in enumerate(config.addresses):
            try:
                self._connections.append(
                    Connection(
                        address,
                        functools.partial(self._receive, shard),
                        functools.partial(self._on_lost, shard),
                        config.connect_timeout_seconds,
                        config.credentials,
                        config.credit_bytes,
                        self._limiters,
                        config.timeline,
                    )
                )
                self._down_since[shard] = time.monotonic()
                self._connections[shard].start(self._hello(shard))
                self._await_welcome(shard)
            except BaseException:
                self.close()
                raise
            self._heartbeats.append(
                Heartbeat(
                    address,
                    config.worker,
                    self._incarnation,
                    config.detection_seconds,
                    functools.partial(self._on_silence, shard),
                    config.credentials,
                )
            )
        self._first_welcome = self._welcomes[0]
        self.job_seed = self._welcomes[0].job_seed

    def _await_welcome(self, shard: int) -> None:
        deadline = time.monotonic() + self.config.connect_timeout_seconds
        with self._changed:
            while self._welcomes[shard] is None:
                self._check()
                if not self._changed.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
                    if time.monotonic() < deadline:
                        continue
                    raise AggregatorUnreachableError(
                        "Expected a welcome from the aggregation service at "
                        f"{self.config.addresses[shard]} within "
                        f"{self.config.connect_timeout_seconds:g} s. Received: nothing. Is it "
                        "another kind of server?"
                    )
            self._check()

    def _hello(self, shard: int) -> bytes:
        config = self.config
        hello = pb.Hello(
            protocol=wire.PROTOCOL,
            worker=config.worker,
            incarnation=self._incarnation,
            num_workers=config.num_workers,
            cutoff=config.cutoff,
            shard=shard,
            num_shards=len(config.addresses),
            history_rounds=config.history_rounds,
            history_bytes=config.history_bytes,
            host="" if config.transport == "grpc" else host_id(),
            deterministic=config.deterministic,
            address=config.address,
            min_workers=config.min_workers,
            detection_seconds=config.detection_seconds,
            propagation=config.propagation,
            credit_bytes=config.credit_bytes,
            runs_ahead=config.runs_ahead,
            centre=config.centre,
            serves=config.serves,
            strategy=config.strategy,
        )
        welcome = self._welcomes[shard]
        if welcome is not None:
            hello.standing.job_seed = self._shard_seeds[shard]
            hello.standing.service = welcome.service
            hello.standing.members.extend(self._members)
            self._stand(shard, hello.standing)
        return wire.encode(pb.ToAggregator(hello=hello))

    def _stand(self, shard: int, standing: pb.Standing) -> None:
        """Adds what a part knows of the job; called with `_changed` held."""

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        """Says again what was not answered; called with `_changed` held.

        Args:
            shard: The shard.
            welcome: What it has said.
            is_new: Whether it is another process than before.
        """

    def _give_stored(self, shard: int) -> None:
        """Gives what the service may want before it goes on; called with `_changed` held."""

    def _on_silence(self, shard: int) -> None:
        # A service that was started again may have said welcome before the first heartbeat since.
        seconds = max(_NEW_SECONDS, self.config.detection_seconds)
        is_new = time.monotonic() - self._welcomed_at[shard] < seconds
        if self._ready[shard] and not is_new:
            self._connections[shard].abandon()

    def _on_lost(
        self,
        shard: int,
        connection: Connection,
        error: ServiceError,
        code: grpc.StatusCode | None,
    ) -> None:
        """Opens a stream anew that has broken; called on its thread."""
        with self._changed:
            if self._error is not None or connection is not self._connections[shard]:
                return
            # Before a welcome it means that too many come at once; later, that this takes too much.
            crowded = code is grpc.StatusCode.RESOURCE_EXHAUSTED and not self._ready[shard]
            self._ready[shard] = False
            # A goodbye that is said from now on has not reached the service, and is said again.
            leaving = self._leaving
            now = time.monotonic()
            since = self._down_since[shard] = self._down_since[shard] or now
        if (code not in _PASSING and not crowded) or leaving:
            self.cancel(error)
            return
        patience = self.config.connect_timeout_seconds
        if code is grpc.StatusCode.ALREADY_EXISTS:
            # The service may not have noticed yet that this worker's former process is gone.
            patience = min(patience, 2 * self.config.detection_seconds + 1.0)
        deadline = since + patience
        time.sleep(random.uniform(0.02, 0.3))
        while time.monotonic() < deadline and not self.has_failed:
            try:
                left = max(0.1, deadline - time.monotonic())
                anew = Connection(
                    connection.address,
                    functools.partial(self._receive, shard),
                    functools.partial(self._on_lost, shard),
                    min(left, 5.0),
                    self.config.credentials,
                    self.config.credit_bytes,
                    self._limiters,
                    self.config.timeline,
                )
            except AggregatorUnreachableError:
                continue
            with self._changed:
                if self._error is not None:
                    anew.close()
                    break
                self._connections[shard] = anew
                anew.start(self._hello(shard))
                self._give_stored(shard)
            connection.close()
            return
        self.cancel(error)

    def _on_welcome(self, shard: int, message: pb.Welcome, *_: object) -> None:
        before, self._welcomes[shard] = self._welcomes[shard], message
        self._shard_seeds[shard] = message.job_seed
        connection = self._connections[shard]
        self._down_since[shard], self._welcomed_at[shard] = None, time.monotonic()
        self._ready[shard] = True
        self._former += [m for m in (self._lending[shard], self._opened[shard]) if m is not None]
        self._opened[shard], self._lending[shard] = Opened(), None
        self._share_memory(shard, connection, message)
        if before is not None:
            is_new = before.service != message.service
            self._on_notice(
                f"worker {self.config.worker} is connected again to the service at "
                f"{connection.address}" + (", which was started again" if is_new else "")
            )
            self._resend(shard, message, is_new)

    def _on_ack(self, shard: int, message: pb.Ack, *_: object) -> bool:
        self._connections[shard].acknowledge(message.bytes)
        return False

    def _on_members(self, shard: int, message: pb.Members, *_: object) -> None:
        if not shard:
            self._members = tuple(message.workers)
            self._served_at = (
                dict(zip(message.workers, message.addresses, strict=False)),
                dict(zip(message.done, message.addresses_of_done, strict=False)),
            )

    # How.

    def _share_memory(self, shard: int, connection: Connection, welcome: pb.Welcome) -> None:
        if welcome.host:
            self._lending[shard] = Lending(lambda m: connection.send(wire.encode(m)))
        elif self.config.transport == "shared_memory":
            self._error = self._error or ServiceError(
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
        self._post(0, wire.encode(message, *pieces))

    def _send_state(self, message: pb.ToAggregator, *pieces: bytes | memoryview) -> None:
        """Gives something of a state to the shard that hands it on, without delaying anything."""
        if self._ready[0]:
            encode = functools.partial(wire.encode, message, *pieces)
            self._connections[0].send(encode, in_background=True)

    def _send_all(self, message: pb.ToAggregator) -> None:
        data = wire.encode(message)
        for shard in range(len(self._connections)):
            self._post(shard, data)

    def _send(self, shard: int, message: pb.ToAggregator) -> None:
        self._post(shard, wire.encode(message))

    def _post(self, shard: int, message: Outgoing) -> None:
        if self._ready[shard]:
            self._connections[shard].send(message)

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
            is_news = getattr(self, f"_on_{body}")(shard, getattr(header, body), payload)
            if is_news is not False:
                self._changed.notify_all()
