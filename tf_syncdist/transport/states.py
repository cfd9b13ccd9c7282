"""Variables that travel between workers: at the start, and to a worker that needs another's."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import ModelMismatchError, ServiceError
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.link import Link, SessionConfig

_CHUNK_BYTES = 2**20

# A receiver of state waits this long before it asks again, so that a worker which is always far
# behind does not keep the others busy (rule 9 of docs/semantics.md).
_STATE_PAUSE_SECONDS = 30.0


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
            buffer = self.buffers[chunk.variable] = bytearray()
        if chunk.offset != len(buffer):
            raise ServiceError(
                f"Expected byte {len(buffer)} of variable {chunk.variable} from the worker that "
                f"gives its state. Received: byte {chunk.offset}."
            )
        # It grows with what has come: a size that another worker claims may be any number.
        buffer += payload
        last = chunk.variable + 1 == chunk.num_variables
        if last and chunk.offset + payload.nbytes == chunk.total:
            self.missing = 0


class StateTransfer(Link):
    """The part of a session that is about other workers' variables."""

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        self._verdicts: dict[int, str] = {}
        self._incoming: dict[int, _Incoming] = {}
        self._asked_at = -_STATE_PAUSE_SECONDS
        self._asks_giver = False

    def take_state_requests(self) -> list[int]:
        """Returns requests for this worker's state, each of them once."""
        with self._changed:
            requests, self._give = self._give, []
            return requests

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
        self._send_first(pb.ToAggregator(manifest=manifest))
        with self._changed:
            what = "all workers to have built their models"
            self._wait(lambda: run in self._verdicts, what, gives_state=lambda: True)
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
                self._send_first(pb.ToAggregator(state_chunk=chunk), piece)

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
            self._asks_giver = False
            self._changed.notify_all()
        values = []
        for buffer, (name, dtype, shape) in zip(incoming.buffers, specs, strict=True):
            value = np.frombuffer(buffer or b"", dtype)
            if value.size != int(np.prod(shape)):
                raise ServiceError(
                    f"Expected {shape} values for {name}. Received: {value.size} of them."
                )
            values.append(value.reshape(shape))
        return State(incoming.run, values)

    def request_state(self, run: int, giver: int | None = None) -> None:
        """Asks for the state of another worker; `receive_state` waits for it.

        Args:
            run: The first run whose result this worker could not get, or its next run.
            giver: The worker whose state is wanted. If it is gone or behind, another one gives
                its own, as far as this worker at least. Without it any worker that is further is
                asked, at most every 30 s.
        """
        request = pb.StateRequest(run=run, giver=giver)
        with self._changed:
            if giver is not None:
                self._wait(lambda: not self._asks_giver, "the state that was asked for before")
                self._asks_giver = True
            else:
                until = self._asked_at + _STATE_PAUSE_SECONDS
                while time.monotonic() < until:
                    self._check()
                    self._changed.wait(until - time.monotonic())
                self._asked_at = time.monotonic()
        self._send_all(pb.ToAggregator(state_request=request))

    # How.

    def _on_manifest_verdict(self, shard: int, message: pb.ManifestVerdict, *_: object) -> None:
        self._verdicts[message.run] = message.error

    def _on_state_chunk(self, shard: int, chunk: pb.StateChunk, payload: memoryview) -> None:
        incoming = self._incoming.get(chunk.request)
        if incoming is None:
            incoming = self._incoming[chunk.request] = _Incoming(chunk.run, chunk.num_variables)
        incoming.add(chunk, payload)
