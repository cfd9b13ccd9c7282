"""Variables that travel between workers: at the start, and to a worker that needs another's."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import ModelMismatchError, ServiceError
from tf_syncdist.propagation.slices import layout_of
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.link import Link
from tf_syncdist.transport.session_config import SessionConfig

_CHUNK_BYTES = 2**20
_UNKNOWN = pb.ManifestVerdict()

# Name, dtype and shape of a variable.
Spec = tuple[str, str, tuple[int, ...]]

# A receiver of state waits this long before it asks again, so that a worker which is always far
# behind does not keep the others busy (rule 9 of docs/semantics.md).
_STATE_PAUSE_SECONDS = 30.0


class State(NamedTuple):
    """Variables of another worker, as they are before run `run`.

    Args:
        run: The run.
        values: The variables that were asked for, in their order.
        rounds: How many rounds the other worker has taken part in; 0 at the start of a job.
    """

    run: int
    values: list[np.ndarray]
    rounds: int = 0


class _Incoming:
    """Variables that are being received."""

    def __init__(self, run: int, num_variables: int) -> None:
        self.run = run
        self.manifest: pb.StateManifest | None = None
        self.buffers: list[bytearray | None] = [None] * num_variables
        self.is_complete = False

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
        self.is_complete = last and chunk.offset + payload.nbytes == chunk.total

    def take(self, specs: Sequence[Spec]) -> list[np.ndarray]:
        """Returns some of the variables, found by their names where these were given."""
        order = range(len(specs))
        if self.manifest is not None:
            places: dict[Spec, list[int]] = {}
            for index, v in enumerate(self.manifest.variables):
                places.setdefault((v.name, v.dtype, tuple(v.shape)), []).append(index)
            order = []
            for spec in specs:
                if not places.get(tuple(spec)):
                    raise ModelMismatchError(
                        f"Expected the variable {spec[0]} ({spec[1]}, shape {list(spec[2])}) in "
                        "the state of another worker. Received: a state without it. Build the same "
                        "model and use the same optimizer on every worker."
                    )
                order.append(places[tuple(spec)].pop(0))
        values = []
        for place, (name, dtype, shape) in zip(order, specs, strict=True):
            value = np.frombuffer(self.buffers[place] or b"", dtype)
            if value.size != int(np.prod(shape)):
                raise ServiceError(
                    f"Expected {int(np.prod(shape))} value(s) for {name}. Received: {value.size}. "
                    "Every worker must build the same model."
                )
            values.append(value.reshape(shape))
        return values


class StateTransfer(Link):
    """The part of a session that is about other workers' variables."""

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        self._verdicts: dict[int, pb.ManifestVerdict] = {}
        self._manifest: pb.Manifest | None = None
        self._incoming: dict[int, _Incoming] = {}
        self._headers: dict[int, pb.StateManifest] = {}
        self._asked_at = -_STATE_PAUSE_SECONDS
        self._request: pb.StateRequest | None = None
        # Fingerprints of the variables that this worker holds in common with others.
        self._common: list[int] = []

    def take_state_requests(self) -> list[int]:
        """Returns requests for this worker's state, each of them once."""
        with self._changed:
            requests, self._give = self._give, []
            return requests

    def agree(self, run: int, variables: Sequence[Spec]) -> bool:
        """Waits until every worker is about to train the same variables.

        Args:
            run: The run before which they are synchronised.
            variables: Name, dtype and shape of every variable.

        Returns:
            Whether the others train them already, so that a state is to be asked for.

        Raises:
            ModelMismatchError: If they differ between workers.
        """
        specs = [pb.VariableSpec(name=n, dtype=d, shape=s) for n, d, s in variables]
        with self._changed:
            self._manifest = pb.Manifest(run=run, variables=specs)
            self._send_first(pb.ToAggregator(manifest=self._manifest))
            what = "all workers to have built their models"
            self._wait(lambda: run in self._verdicts, what, gives_state=lambda: True)
            verdict = self._verdicts.pop(run)
            if verdict.known or self.config.worker == 0:
                self._manifest = None
        if verdict.error:
            raise ModelMismatchError(verdict.error)
        return verdict.known

    def hold(self, variables: Sequence[Spec]) -> None:
        """Takes note of variables that this worker now holds in common with others."""
        with self._changed:
            self._common += [_fingerprint(v) for v in variables]
            self._manifest = None

    def give_state(
        self,
        request: int,
        run: int,
        values: Sequence[np.ndarray],
        variables: Sequence[Spec] = (),
        rounds: int = 0,
    ) -> None:
        """Sends this worker's variables as they are before run `run`.

        Args:
            request: 0 for the start, else the request that this answers.
            run: The run.
            values: The variables.
            variables: Name, dtype and shape of each, so that the receiver may want some of them,
                or have them in another order.
            rounds: How many rounds this worker has taken part in, one way or another.
        """
        if variables:
            specs = [pb.VariableSpec(name=n, dtype=d, shape=s) for n, d, s in variables]
            manifest = pb.StateManifest(request=request, run=run, rounds=rounds, variables=specs)
            self._send_state(pb.ToAggregator(state_manifest=manifest))
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
                self._send_state(pb.ToAggregator(state_chunk=chunk), piece)

    def receive_state(self, specs: Sequence[Spec]) -> State | None:
        """Waits for variables that were asked for, or that worker 0 gives at the start.

        Args:
            specs: Name, dtype and shape of the variables that are wanted.

        Returns:
            The variables; `None` if the service was started again meanwhile and worker 0 is past
            the start, so that they have to be asked for.
        """
        with self._changed:

            def is_past() -> bool:
                start = self._manifest
                return start is not None and self._verdicts.get(start.run, _UNKNOWN).known

            def there() -> bool:
                said = is_past() or any(v.error for v in self._verdicts.values())
                return said or any(i.is_complete for i in self._incoming.values())

            self._wait(there, "the variables of an up-to-date worker")
            for verdict in self._verdicts.values():
                if verdict.error:
                    raise ServiceError(verdict.error)
            if is_past():
                self._verdicts.clear()
                self._manifest = None
                return None
            number, incoming = next((n, i) for n, i in self._incoming.items() if i.is_complete)
            self._incoming.clear()
            self._request = self._manifest = None
            incoming.manifest = self._headers.pop(number, None)
            self._headers.clear()
            self._changed.notify_all()
        rounds = incoming.manifest.rounds if incoming.manifest is not None else 0
        return State(incoming.run, incoming.take(specs), rounds)

    def request_state(
        self, run: int, giver: int | None = None, level_will_do: bool = False
    ) -> None:
        """Asks for the state of another worker; `receive_state` waits for it.

        Args:
            run: The first run whose result this worker could not get, or its next run.
            giver: The worker whose state is wanted. If it is gone or behind, another one gives
                its own, as far as this worker at least. Without it any worker that is further is
                asked, at most every 30 s.
            level_will_do: Whether one that is as far as this worker may give its own, too.
        """
        request = pb.StateRequest(run=run, giver=giver, level_will_do=level_will_do)
        with self._changed:
            if giver is not None or level_will_do:
                self._wait(lambda: self._request is None, "the state that was asked for before")
            else:
                until = self._asked_at + _STATE_PAUSE_SECONDS
                while time.monotonic() < until:
                    self._check()
                    self._changed.wait(until - time.monotonic())
                self._asked_at = time.monotonic()
            self._ask(request)

    # How.

    def _ask(self, request: pb.StateRequest) -> None:
        self._request = request
        self._incoming.clear()
        self._headers.clear()
        self._send_all(pb.ToAggregator(state_request=request))

    def _stand(self, shard: int, standing: pb.Standing) -> None:
        super()._stand(shard, standing)
        if not shard:
            standing.variables.extend(self._common)

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        super()._resend(shard, welcome, is_new)
        if not shard:
            self._give.clear()
            self._incoming.clear()
            self._headers.clear()
            if self._manifest is not None:
                self._send_first(pb.ToAggregator(manifest=self._manifest))

    def _ask_again(self, shard: int) -> None:
        """Asks anew for a state that has not come, when all else has been said."""
        if self._request is not None:
            self._send(shard, pb.ToAggregator(state_request=self._request))

    def _on_manifest_verdict(self, shard: int, message: pb.ManifestVerdict, *_: object) -> None:
        self._verdicts[message.run] = message

    def _on_state_manifest(self, shard: int, message: pb.StateManifest, *_: object) -> None:
        self._headers[message.request] = message

    def _on_state_chunk(self, shard: int, chunk: pb.StateChunk, payload: memoryview) -> None:
        if not chunk.request and (self._manifest is None or self._request is not None):
            return  # For those that begin; this worker asks for a state, or has one.
        incoming = self._incoming.get(chunk.request)
        if incoming is None:
            incoming = self._incoming[chunk.request] = _Incoming(chunk.run, chunk.num_variables)
        incoming.add(chunk, payload)


def _fingerprint(spec: Spec) -> int:
    name, dtype, shape = spec
    return layout_of([(name, dtype, tuple(shape))])
