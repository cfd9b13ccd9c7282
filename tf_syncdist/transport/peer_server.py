"""What a worker serves to others that mix their models with its own.

No call waits for the training: what is pulled is the last model that was published, and what is
pushed is added up until the training takes it.
"""

import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from tf_syncdist.mixing import gossip
from tf_syncdist.proto import tf_syncdist_peers_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials
from tf_syncdist.transport.guards import CallGuard, Refusals
from tf_syncdist.transport.models import Model, ModelFormat, OtherTraining, Refusal
from tf_syncdist.transport.server_threads import ServerThreads

# A call holds a thread. More of them wait for one, and more than that are refused.
_THREADS = 16
_MOST_CALLS = 64
# Each holds a model until it is whole.
_PUSHES = 2
# A call without a deadline, or with a later one, is refused: it could hold its thread for ever.
_MOST_SECONDS = 3600.0

_NOT_OURS = "call that no correct worker makes"

# Models come in parts of half of that.
_MOST_MESSAGE_BYTES = 4 * 2**20

_OPTIONS = (
    *(o for o in wire.CHANNEL_OPTIONS if o[0] != "grpc.max_receive_message_length"),
    ("grpc.max_receive_message_length", _MOST_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
)


class Pushed:
    """Models that others have pushed, added up variable by variable."""

    def __init__(self, inboxes: list[gossip.Inbox], count: int) -> None:
        self.inboxes = inboxes
        self.count = count


class PeerServer:
    """Serves one worker's model.

    Args:
        worker: The worker.
        host: Address to listen on.
        port: Port to listen on; 0 for a free one.
        credentials: What it demands of others.
        on_heard: Called with every worker that has called.
        on_event: Called with one line where something was refused.

    Attributes:
        port: The port.

    Raises:
        CredentialsError: If the credentials cannot be used, or would be exposed.
        OSError: If the port cannot be had.

    Example:

    >>> with PeerServer(worker=0) as server:
    ...     address = f"127.0.0.1:{server.port}"
    """

    def __init__(
        self,
        worker: int,
        host: str = "127.0.0.1",
        port: int = 0,
        credentials: Credentials = NO_CREDENTIALS,
        on_heard: Callable[[int], None] = lambda worker: None,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._worker = worker
        self._on_heard = on_heard
        self._refusals = Refusals(on_event)
        self._lock = threading.Lock()
        self._pushes = threading.BoundedSemaphore(_PUSHES)
        self._job_seed: int | None = None
        self._format: ModelFormat | None = None
        self._step = 0
        # Messages of one step. Nobody changes them, so who is reading them may go on while the
        # next ones take their place.
        self._published: tuple[bytes, ...] | None = None
        self._pushed = Pushed([], 0)
        self._closed = False
        self._threads = ServerThreads(_THREADS, "tf_syncdist_peer")
        self._server = grpc.server(
            self._threads,
            interceptors=(
                CallGuard(credentials, (wire.GREET, wire.PULL, wire.PUSH), self._refusals),
            ),
            options=_OPTIONS,
            maximum_concurrent_rpcs=_MOST_CALLS,
        )
        handlers = {
            "Greet": grpc.unary_unary_rpc_method_handler(
                self._greet, response_serializer=pb.GreetReply.SerializeToString
            ),
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull),
            "Push": grpc.stream_unary_rpc_method_handler(
                self._push, response_serializer=pb.PushReply.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.PEERS, handlers),)
        )
        self.port = credentials.add_port(self._server, host, port)
        self._server.start()

    def __enter__(self) -> "PeerServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def refused(self) -> dict[str, int]:
        """How often a call was refused, by the reason."""
        return self._refusals.counts()

    def begin(self, job_seed: int, models: ModelFormat) -> None:
        """Names the job, and what the models look like; calls are answered from then on.

        What was shown and handed over before is of another training, and forgotten.
        """
        with self._lock:
            self._job_seed = job_seed
            self._format = models
            self._step, self._published = 0, None
            self._pushed = Pushed([], 0)

    def publish(self, model: Model) -> tuple[bytes, ...]:
        """Shows a model from now on, in place of the one before.

        Returns:
            The messages in which it travels.
        """
        parts = self._format.write(model)
        with self._lock:
            self._published = parts
            self._step = model.step
        return parts

    def take_pushed(self) -> Pushed:
        """Returns what was pushed since the last call."""
        with self._lock:
            pushed, self._pushed = self._pushed, Pushed([], 0)
        return pushed

    def close(self, grace_seconds: float = 0.2) -> None:
        """Stops serving. May be called twice."""
        if not self._closed:
            self._closed = True
            self._server.stop(grace_seconds).wait(grace_seconds + 5)
            self._threads.shutdown(wait=False)

    # Calls.

    def _greet(self, request: bytes, context: grpc.ServicerContext) -> pb.GreetReply:
        try:
            greeting = pb.GreetRequest.FromString(request)
        except DecodeError:
            self._refuse(context, f"Expected a GreetRequest. Received: {len(request)} other bytes.")
        with self._lock:
            seed, models = self._job_seed, self._format
            has_model, step = self._published is not None, self._step
        if models is None:
            return pb.GreetReply(worker=self._worker)
        if greeting.job_seed != seed:
            self._refuse(
                context,
                f"Expected a worker of the same job. Received: worker {greeting.worker} of another "
                "one. End what is left of the other job.",
            )
        self._on_heard(greeting.worker)
        fit, revision = models.key
        return pb.GreetReply(
            worker=self._worker,
            has_model=has_model,
            step=step,
            variables=models.specs,
            fit=fit,
            revision=revision,
        )

    def _pull(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        models = self._begun(context)
        if models is None:
            return
        try:
            header, _ = wire.decode(pb.ToPeer, request)
            if header.WhichOneof("body") != "pull":
                raise Refusal("Expected a PullRequest. Received: another message.")
            asked = header.pull
            models.check(asked)
        except OtherTraining:
            return
        except (wire.WireError, Refusal) as e:
            self._refuse(context, str(e))
        self._on_heard(asked.worker)
        with self._lock:
            parts = self._published if self._format is models else None
        yield from parts or ()

    def _push(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> pb.PushReply:
        models = self._begun(context)
        if models is None:
            return pb.PushReply()
        if not self._pushes.acquire(timeout=context.time_remaining()):
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "Too many push at the same time.")
        try:
            model = models.read(requests)
        except OtherTraining:
            return pb.PushReply()
        except Refusal as e:
            self._refuse(context, str(e))
        finally:
            self._pushes.release()
        if model is None:
            self._refuse(context, "Expected a model. Received: nothing.")
        return pb.PushReply(waiting=self._add(models, model.values))

    def _add(self, models: ModelFormat, values: list[np.ndarray]) -> int:
        with self._lock:
            if self._format is not models:
                # Another training has begun while it came.
                return self._pushed.count
            before = self._pushed.inboxes or [gossip.Inbox() for _ in values]
            inboxes = [gossip.received(i, v) for i, v in zip(before, values, strict=True)]
            self._pushed = Pushed(inboxes, self._pushed.count + 1)
            return self._pushed.count

    def _begun(self, context: grpc.ServicerContext) -> ModelFormat | None:
        """Returns what models look like; `None` if this worker does not train yet."""
        remaining = context.time_remaining()
        if remaining is None or remaining > _MOST_SECONDS:
            self._refuse(
                context, f"Expected a deadline of at most {_MOST_SECONDS:g} s. Received: none."
            )
        with self._lock:
            return self._format

    def _refuse(self, context: grpc.ServicerContext, details: str) -> NoReturn:
        self._refusals.add(_NOT_OURS, details)
        # It may name what a worker has said, which need not be text that can be sent.
        text = details.encode(errors="backslashreplace").decode()
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, text[:1500])
