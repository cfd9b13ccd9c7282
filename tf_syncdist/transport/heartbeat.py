"""Tells a shard that this worker is alive, and notices when the shard is not."""

import threading
import time
from collections.abc import Callable

import grpc

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials

# A shard may be busy for longer than a worker may be silent, and nobody waits for it meanwhile.
_LEAST_PATIENCE_SECONDS = 5.0

# After a failure: a shard that was started again may expect to hear of a worker this often.
_MOST_PAUSE_SECONDS = 0.25


class Heartbeat:
    """A thread that says "I am alive" to a shard, on a connection of its own.

    Bulk data on a thin network can stand in front of a message for many seconds; these have no
    bulk data in front of them.

    Args:
        address: "host:port" of the shard.
        worker: Index of this worker.
        incarnation: This life of it.
        detection_seconds: How long to wait for an answer.
        on_silence: Called when the shard has not answered for long, again and again.
        credentials: What is shown to the shard, and demanded of it.
    """

    def __init__(
        self,
        address: str,
        worker: int,
        incarnation: int,
        detection_seconds: float,
        on_silence: Callable[[], None],
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self._request = pb.BeatRequest(worker=worker, incarnation=incarnation)
        self._timeout = max(detection_seconds, 1.0)
        self._patience = max(3 * detection_seconds, _LEAST_PATIENCE_SECONDS)
        self._on_silence = on_silence
        self._channel = credentials.channel(address)
        self._call = self._channel.unary_unary(
            wire.BEAT, pb.BeatRequest.SerializeToString, pb.BeatReply.FromString
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tf_syncdist_beat", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Falls silent. May be called twice."""
        if not self._closed.is_set():
            self._closed.set()
            self._channel.close()
            if threading.current_thread() is not self._thread:
                self._thread.join(2.0)

    def _beat(self) -> None:
        failures, answered, pause = 0, time.monotonic(), 0.0
        while not self._closed.wait(pause):
            pause = min(self._timeout / 4, _MOST_PAUSE_SECONDS)
            try:
                reply = self._call(self._request, timeout=self._timeout)
                pause = min(self._timeout / 4, max(0.05, reply.next_seconds))
                failures, answered = 0, time.monotonic()
            except ValueError:
                return  # The channel is closed.
            except grpc.RpcError:
                failures += 1
                # This process may have been stopped itself, so one failure says nothing.
                if failures > 2 and time.monotonic() - answered > self._patience:
                    answered = time.monotonic()
                    if not self._closed.is_set():
                        self._on_silence()
