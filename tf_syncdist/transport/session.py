"""A worker's side of the job: what it has received so far, and waits with deadlines on it."""

import time
from collections.abc import Callable

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.centre import CentreExchanging, Mixed
from tf_syncdist.transport.endings import Ending
from tf_syncdist.transport.gathers import Gathered, Gathering
from tf_syncdist.transport.plans import PlanRelay
from tf_syncdist.transport.session_config import SessionConfig
from tf_syncdist.transport.states import State, StateTransfer

__all__ = ["Gathered", "Mixed", "Session", "SessionConfig", "State"]


class Session(Ending, Gathering, PlanRelay, StateTransfer, CentreExchanging):
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
        super().__init__(config, on_notice)
        self._all_gone = 0
        self._started: pb.Started | None = None
        self._said_goodbye: pb.ToAggregator | None = None
        self._connect()

    def wait_started(self) -> pb.Started:
        """Waits until all workers have come; at once where the job is in progress already.

        Returns:
            Whether it is, and where.
        """
        with self._changed:
            self._wait(lambda: self._started is not None, "all workers to come")
            return self._started

    def has_started(self) -> bool:
        """Returns whether all workers have come, or the job was in progress already."""
        with self._changed:
            self._check()
            return self._started is not None

    def goodbye(self, reason: int, run: int) -> None:
        """Tells the service that this worker does no more runs."""
        with self._changed:
            self._leaving = True
            self._said_goodbye = pb.ToAggregator(goodbye=pb.Goodbye(reason=reason, run=run))
            self._send_all(self._said_goodbye)

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

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        super()._resend(shard, welcome, is_new)
        # What this worker has done moves it on, and a request is about where it is.
        self._ask_again(shard)
        if self._said_goodbye is not None:
            # The stream was being opened anew when it was said.
            self._send(shard, self._said_goodbye)

    def _on_all_gone(self, *_: object) -> None:
        self._all_gone += 1

    def _on_started(self, shard: int, message: pb.Started, *_: object) -> None:
        self._shard_seeds[shard] = message.job_seed
        if not shard and self._started is None:
            self._started = message
            self.job_seed = message.job_seed
