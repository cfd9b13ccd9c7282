"""A worker's view of the others whose models it mixes with its own: who answers, and who does not.

A partner that fails costs one deadline and is left alone until it is heard of again: the service
says that it is back, it calls, or it answers one of the greetings that a thread of its own sends.
"""

import threading
from collections.abc import Callable, Iterable, Mapping

import grpc

from tf_syncdist.errors import CredentialsError
from tf_syncdist.proto import tf_syncdist_peers_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials
from tf_syncdist.transport.models import Model, ModelFormat, OtherTraining, Refusal

_GREET_SECONDS = 1.0
# Besides, a model may take as long as if a second brought so many bytes of it.
_LEAST_BYTES_PER_SECOND = 10 * 2**20


class Partners:
    """Calls the other workers.

    Args:
        worker: This worker.
        job_seed: Names the job.
        timeout_seconds: How long a partner may take to answer, besides the time of its bytes.
        credentials: What is shown to partners, and demanded of them.
        on_notice: Called with one line for the user.

    Example:

    >>> with Partners(worker=0, job_seed=1) as partners:
    ...     partners.update({1: "127.0.0.1:5000"})
    ...     partners.present([0, 1])
    [0, 1]
    """

    def __init__(
        self,
        worker: int,
        job_seed: int,
        timeout_seconds: float = 2.0,
        credentials: Credentials = NO_CREDENTIALS,
        on_notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._worker = worker
        self._job_seed = job_seed
        self._timeout = timeout_seconds
        self._credentials = credentials
        self._on_notice = on_notice
        self._lock = threading.Lock()
        self._addresses: dict[int, str] = {}
        self._silent: set[int] = set()
        # Why each was given up last: the same is not said again.
        self._said: dict[int, str] = {}
        self._channels: dict[int, tuple[str, grpc.Channel]] = {}
        self._calls: set[grpc.Call] = set()
        self._closed = threading.Event()
        self._cancelled = threading.Event()
        self._greeter = threading.Thread(
            target=self._greet_silent, name="tf_syncdist_greeter", daemon=True
        )
        self._greeter.start()

    def __enter__(self) -> "Partners":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, addresses: Mapping[int, str]) -> None:
        """Takes note of where the workers are that take part, as the service says."""
        with self._lock:
            for worker, address in addresses.items():
                if self._addresses.get(worker) != address:
                    # It is new, or back, or another process than before.
                    self._silent.discard(worker)
            self._addresses = {w: a for w, a in addresses.items() if a}
            gone = [w for w in self._channels if w not in self._addresses]
            channels = [self._channels.pop(w)[1] for w in gone]
        for channel in channels:
            channel.close()

    def heard(self, worker: int) -> None:
        """Takes note that a worker has called, so it is there."""
        with self._lock:
            self._silent.discard(worker)

    def present(self, workers: Iterable[int]) -> list[int]:
        """Returns those of some workers with whom an exchange can be tried, this one among them."""
        with self._lock:
            there = {self._worker, *(w for w in self._addresses if w not in self._silent)}
        return [w for w in workers if w in there]

    def pull(self, worker: int, models: ModelFormat) -> Model | None:
        """Returns another worker's model; `None` if it has none of this training, or is silent.

        Args:
            worker: The other worker.
            models: What models look like.
        """

        def read(channel: grpc.Channel, timeout: float) -> Model | None:
            call = channel.unary_stream(wire.PULL)(models.pull_request(), timeout=timeout)
            with self._known(call):
                return models.read(call, worker)

        return self._try(worker, models.nbytes, read)

    def push(self, worker: int, models: ModelFormat, parts: tuple[bytes, ...]) -> bool:
        """Hands a model over to another worker; returns whether it has it.

        Args:
            worker: The other worker.
            models: What models look like.
            parts: The model, as `ModelFormat.write` returns it.
        """

        def write(channel: grpc.Channel, timeout: float) -> bool:
            call = channel.stream_unary(wire.PUSH).future(iter(parts), timeout=timeout)
            with self._known(call):
                pb.PushReply.FromString(call.result())
            return True

        return bool(self._try(worker, models.nbytes, write))

    def greet(self, worker: int) -> pb.GreetReply | None:
        """Asks another worker what it trains; `None` if it does not answer."""

        def ask(channel: grpc.Channel, timeout: float) -> pb.GreetReply:
            return self._greeting(channel, timeout)

        return self._try(worker, 0, ask)

    def cancel(self) -> None:
        """Ends the calls in progress and makes no more: everybody is silent from then on."""
        self._cancelled.set()
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def close(self) -> None:
        """Ends all connections. May be called twice."""
        self._closed.set()
        with self._lock:
            channels = [channel for _, channel in self._channels.values()]
            self._channels.clear()
        for channel in channels:
            channel.close()
        self._greeter.join(2 * _GREET_SECONDS)

    # How.

    def _try(self, worker: int, nbytes: int, call: Callable) -> object | None:
        try:
            channel = self._channel(worker)
            if channel is None:
                return None
            return call(channel, self._timeout + nbytes / _LEAST_BYTES_PER_SECOND)
        except OtherTraining:
            pass
        except Refusal as e:
            self._give_up(worker, str(e))
        except (grpc.FutureCancelledError, grpc.FutureTimeoutError) as e:
            if not self._cancelled.is_set():
                self._give_up(worker, type(e).__name__)
        except grpc.RpcError as e:
            code = e.code() if hasattr(e, "code") else grpc.StatusCode.UNKNOWN
            details = e.details() if hasattr(e, "details") else str(e)
            if not self._closed.is_set() and not self._cancelled.is_set():
                self._give_up(worker, f"{code.name}: {' '.join(str(details).split())[:500]}")
        except CredentialsError as e:
            self._give_up(worker, str(e))
        except ValueError:
            # The channel was closed meanwhile.
            pass
        return None

    def _give_up(self, worker: int, why: str) -> None:
        with self._lock:
            if worker in self._silent or worker not in self._addresses:
                return
            self._silent.add(worker)
            address = self._addresses[worker]
            is_news = self._said.get(worker) != why
            self._said[worker] = why
        if not is_news:
            return
        self._on_notice(
            f"worker {worker} at {address} does not answer worker {self._worker}, which goes on "
            f"without it until it is heard of again ({why})"
        )

    def _channel(self, worker: int) -> grpc.Channel | None:
        with self._lock:
            address = self._addresses.get(worker)
            if address is None or self._closed.is_set() or self._cancelled.is_set():
                return None
            known = self._channels.get(worker)
            if known is not None and known[0] == address:
                return known[1]
            channel = self._credentials.channel(address)
            self._channels[worker] = (address, channel)
        if known is not None:
            known[1].close()
        return channel

    def _known(self, call: grpc.Call) -> "_Known":
        return _Known(self._lock, self._calls, call, self._cancelled)

    def _greeting(self, channel: grpc.Channel, timeout: float) -> pb.GreetReply:
        greet = channel.unary_unary(
            wire.GREET, pb.GreetRequest.SerializeToString, pb.GreetReply.FromString
        )
        request = pb.GreetRequest(job_seed=self._job_seed, worker=self._worker)
        call = greet.future(request, timeout=timeout)
        with self._known(call):
            return call.result()

    def _greet_silent(self) -> None:
        """Looks now and then whether a silent worker answers again."""
        while not self._closed.wait(_GREET_SECONDS):
            with self._lock:
                silent = [w for w in self._silent if w in self._addresses]
            for worker in silent:
                try:
                    channel = self._channel(worker)
                    if channel is not None:
                        self._greeting(channel, _GREET_SECONDS)
                        self.heard(worker)
                except (grpc.RpcError, ValueError):
                    if self._closed.is_set():
                        return


class _Known:
    """Keeps a call where `cancel` finds it, and ends it if it is left early."""

    def __init__(
        self, lock: threading.Lock, calls: set, call: grpc.Call, cancelled: threading.Event
    ) -> None:
        self._lock, self._calls, self._call, self._cancelled = lock, calls, call, cancelled

    def __enter__(self) -> None:
        with self._lock:
            self._calls.add(self._call)
        if self._cancelled.is_set():
            self._call.cancel()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls.discard(self._call)
        self._call.cancel()
