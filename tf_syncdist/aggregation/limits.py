"""How much of the service one worker, or a stranger, may take."""

import collections
import threading
from typing import NamedTuple

import grpc

from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.available import available_bytes

# Where the system does not tell how much memory it has.
_FALLBACK_BYTES = 4 * 2**30

# A slice takes about as much memory as this besides its values.
_SLICE_BYTES = 4096
# The service looks at every open slice, every second and when a worker leaves.
_MOST_SLICES = 2**18
# How far ahead of itself a worker may vote; the input is read a few runs ahead at most. All votes
# are looked at again with every contribution.
_RUNS_AHEAD = 256
# Runs without exchange that follow each other: one per step over which gradients are accumulated.
_EMPTY_RUNS = 2**16
# Every one is answered, or makes a line in the log; a worker sends one or a few in its life.
_MOST_IN_A_STREAM = {"segment": 1024, "segment_answer": 4096, "goodbye": 16}
# A training that is stopped has runs; some may be stopped before their first one.
_STOPS_AHEAD = 16

TOO_MUCH = "worker that takes too much"


def default_worker_bytes() -> int:
    """Returns half of the memory that is available now, but at least 1 GiB."""
    available = available_bytes()
    return _FALLBACK_BYTES if available is None else max(2**30, available // 2)


class Limits(NamedTuple):
    """What the service allows; the defaults leave room for every job that fits its machine.

    Args:
        worker_bytes: How many bytes one worker may make the service keep: of contributions to a
            round, of variables before all workers are there, and of what it has not read. 0: half
            of the memory that is available when the service starts.
        hello_seconds: A stream on which no `Hello` has come after this long is ended.
        waiting_streams: How many streams may be waiting for their `Hello` at a time.
        waiting_streams_per_peer: How many of them may be from one connection.
        leaving_seconds: A stream on which the worker does not read its end is broken after this
            long.
    """

    worker_bytes: int = 0
    hello_seconds: float = 10.0
    waiting_streams: int = 128
    waiting_streams_per_peer: int = 32
    leaving_seconds: float = 10.0


DEFAULT_LIMITS = Limits()


class _Account:
    """What one stream has sent."""

    def __init__(self) -> None:
        self.run = 0
        self.slices = 0
        self.bytes = 0
        self.bodies: collections.Counter[str] = collections.Counter()
        self.stopped: set[int] = set()


class Quotas:
    """Refuses messages that would make the service keep more than it allows to one worker.

    It looks at messages before anything is done with them, and knows of the rounds only where a
    worker is. What depends on what is kept already is bounded where it is kept.

    Args:
        worker_bytes: See `Limits`.
        rounds: Knows where workers are.
    """

    def __init__(self, worker_bytes: int, rounds: Rounds) -> None:
        self._worker_bytes = worker_bytes
        self._rounds = rounds
        self._accounts: dict[int, _Account] = {}

    def begin(self, worker: int) -> None:
        """Takes note that a worker has opened a stream."""
        self._accounts[worker] = _Account()

    def check(self, worker: int, body: str, header: pb.ToAggregator, payload_bytes: int) -> None:
        """Takes note of a message.

        Args:
            worker: Who sent it.
            body: What it is.
            header: The message.
            payload_bytes: Size of its payload.

        Raises:
            Refused: If it is too much.
        """
        account = self._accounts.setdefault(worker, _Account())
        most = _MOST_IN_A_STREAM.get(body)
        if most is not None:
            account.bodies[body] += 1
            if account.bodies[body] > most:
                raise _too_much(f"at most {most} messages `{body}` of a worker", "more", worker)
        elif body == "contribution":
            self._contribution(account, worker, header.contribution, payload_bytes)
        elif body == "run_finished":
            self._empty_runs(worker)
        elif body == "end_vote":
            self._vote(worker, header.end_vote)
        elif body == "stop_wish":
            self._stop(account, worker, header.stop_wish)

    def _empty_runs(self, worker: int) -> None:
        count = self._rounds.runs_over - self._rounds.runs_announced
        if count >= _EMPTY_RUNS:
            raise _too_much(
                f"an exchange in one of {_EMPTY_RUNS} runs at least, over which gradients are "
                "accumulated",
                f"the end of one more, after {count} runs without any,",
                worker,
            )

    def _contribution(
        self, account: _Account, worker: int, message: pb.Contribution, payload_bytes: int
    ) -> None:
        if message.run != account.run:
            account.run, account.slices, account.bytes = message.run, 0, 0
        # A result in memory takes as much as the values that lie in the worker's memory.
        nbytes = payload_bytes
        if message.HasField("location"):
            nbytes = message.elements * (8 if message.dtype in _EIGHT_BYTES else 4)
        account.slices += 1
        account.bytes += nbytes + _SLICE_BYTES
        if account.bytes > self._worker_bytes:
            raise _too_much(
                f"at most {self._worker_bytes} bytes from a worker in a round "
                "(--max_worker_bytes of the service)",
                f"{account.bytes} bytes in {account.slices} slice(s) of run {message.run}",
                worker,
            )
        if account.slices > _MOST_SLICES:
            raise _too_much(
                f"at most {_MOST_SLICES} slices from a worker in a round",
                f"one more in run {message.run}, which a larger `bucket_bytes` would join,",
                worker,
            )

    def _vote(self, worker: int, message: pb.EndVote) -> None:
        most = self._rounds.position(worker) + _RUNS_AHEAD
        if message.run > most:
            raise _too_much(
                f"a vote for a run up to {most}, {_RUNS_AHEAD} ahead of the worker's own",
                f"run={message.run}",
                worker,
            )

    def _stop(self, account: _Account, worker: int, message: pb.StopWish) -> None:
        account.stopped.add(message.fit)
        run = self._rounds.position(worker)
        most = run + _STOPS_AHEAD
        if len(account.stopped) > most:
            raise _too_much(
                f"a worker to stop at most {most} trainings in {run} run(s)",
                f"fit={message.fit}, one more,",
                worker,
            )


_EIGHT_BYTES = (pb.FLOAT64, pb.INT64)


def _too_much(expected: str, received: str, worker: int) -> Refused:
    return Refused(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"Expected {expected}. Received: {received} from worker {worker}.",
        TOO_MUCH,
    )


class Waiting:
    """Bounds how many streams wait for their `Hello`.

    Args:
        limits: What is allowed.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._peers: collections.Counter[str] = collections.Counter()

    def enter(self, peer: str) -> None:
        """Takes note that a stream begins.

        Raises:
            Refused: If too many wait.
        """
        with self._lock:
            total, own = self._peers.total(), self._peers[peer]
            limits = self._limits
            if total >= limits.waiting_streams or own >= limits.waiting_streams_per_peer:
                raise Refused(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"Expected at most {limits.waiting_streams} streams without Hello at a time, "
                    f"{limits.waiting_streams_per_peer} of them on one connection. Received: one "
                    f"more, while there are {total}, {own} of them on this one. Try again later.",
                    "stream too many",
                )
            self._peers[peer] += 1

    def leave(self, peer: str) -> None:
        """Takes note that a stream waits no longer."""
        with self._lock:
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]
