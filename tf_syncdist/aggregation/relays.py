"""Hands the state of one worker on to others. One lock of the job's guards it."""

from collections.abc import Callable, Collection, Iterable

import grpc

from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.manifests import Variable
from tf_syncdist.aggregation.outbox import Refused, Streams
from tf_syncdist.aggregation.states import States
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# More than any model has; a manifest takes time and memory by their number.
_MOST_VARIABLES = 100_000

# How long a worker that needs a state waits for somebody who has one.
_NOBODY_SECONDS = 45.0


class StateRelay:
    """Who gives whose variables to whom, and their way through the service.

    Args:
        num_workers: How many workers the job has.
        streams: The connected workers.
        position: Returns the run that a worker is in or about to begin.
        givers: Returns the workers that have a state to give.
        on_event: Called with one line for the service's log.
        most_bytes: How many bytes of variables are kept before all workers are there.
    """

    def __init__(
        self,
        num_workers: int,
        streams: Streams,
        position: Callable[[int], int],
        givers: Callable[[], Collection[int]],
        on_event: Callable[[str], None],
        most_bytes: int = 2**62,
    ) -> None:
        self._states = States(num_workers, most_bytes)
        self._streams = streams
        self._position = position
        self._givers = givers
        self._on_event = on_event
        # Requests for which there is nobody to ask at the moment, and when they came.
        self._pending: dict[int, tuple[int | None, bool, float]] = {}

    def waiting_for(self) -> dict[int, list[int]]:
        """Returns the workers that have sent no variables yet, for each run that waits for them."""
        return self._states.waiting_for()

    def manifest(self, worker: int, message: pb.Manifest) -> None:
        """Takes note of the variables that a worker is about to train."""
        if len(message.variables) > _MOST_VARIABLES:
            raise invalid(
                f"Expected at most {_MOST_VARIABLES} variables. Received: "
                f"{len(message.variables)} of them from worker {worker}."
            )
        variables = [Variable(v.name, v.dtype, tuple(v.shape)) for v in message.variables]
        if self._states.knows(worker, message.run, variables):
            known = pb.ManifestVerdict(run=message.run, known=True)
            self._streams.tell(worker, pb.ToWorker(manifest_verdict=known))
            return
        verdict, chunks = self._states.manifest(worker, message.run, variables)
        self._tell_verdict(message.run, verdict, chunks)

    def chunk(self, worker: int, message: pb.StateChunk, payload: memoryview) -> None:
        """Hands a piece of a worker's state on."""
        if message.offset + payload.nbytes > message.total or not (
            message.variable < message.num_variables <= _MOST_VARIABLES
        ):
            raise invalid(
                f"Expected a piece of one of at most {_MOST_VARIABLES} variables. Received: bytes "
                f"{message.offset} to {message.offset + payload.nbytes} of {message.total}, of "
                f"variable {message.variable} of {message.num_variables}, from worker {worker}."
            )
        # The field numbers of a chunk differ between the two directions, so it is wrapped anew.
        relayed = wire.encode(pb.ToWorker(state_chunk=message), payload)
        last = (
            message.variable + 1 == message.num_variables
            and message.offset + payload.nbytes == message.total
        )
        if not message.request:
            if self._states.start_chunk(worker, message.run, relayed, last):
                self._tell_others(relayed)
            return
        receiver = self._states.chunk(worker, message.request, last)
        if receiver in self._streams:
            self._streams[receiver].put(relayed)

    def header(self, worker: int, message: pb.StateManifest) -> None:
        """Hands on what the following pieces of a worker's state are.

        Raises:
            RoundError: If the worker was not asked for it.
        """
        if len(message.variables) > _MOST_VARIABLES:
            raise invalid(
                f"Expected at most {_MOST_VARIABLES} variables. Received: "
                f"{len(message.variables)} of them from worker {worker}."
            )
        receiver = self._states.chunk(worker, message.request, last=False)
        if receiver in self._streams:
            self._streams.tell(receiver, pb.ToWorker(state_manifest=message))

    def ask(self, receiver: int, wanted: int | None, level_will_do: bool, now: float) -> None:
        """Asks an up-to-date worker for its state, now or when there is one; `States.request`."""
        found = self._states.request(
            receiver, self._givers(), self._position, wanted, level_will_do
        )
        if found is None:
            since = self._pending.get(receiver, (wanted, level_will_do, now))[2]
            self._pending[receiver] = (wanted, level_will_do, since)
            return
        self._pending.pop(receiver, None)
        request, giver = found
        self._on_event(f"worker {giver} gives its state to worker {receiver}")
        self._streams.tell(giver, pb.ToWorker(give_state=pb.GiveState(request=request)))

    def tick(self, now: float) -> None:
        """Asks again for the workers that could be given nothing before."""
        for receiver, (wanted, level_will_do, since) in list(self._pending.items()):
            if now - since > _NOBODY_SECONDS and receiver in self._streams:
                del self._pending[receiver]
                text = (
                    f"Expected a connected worker that is as far as worker {receiver}, to take "
                    f"over its state. Received: none within {_NOBODY_SECONDS:g} s. Start the whole "
                    "job again; with tf_syncdist.callbacks.BackupAndRestore it goes on from its "
                    "last backup."
                )
                self._streams[receiver].close(Refused(grpc.StatusCode.FAILED_PRECONDITION, text))
                continue
            self.ask(receiver, wanted, level_will_do, now)

    def know(self, fingerprints: Iterable[int]) -> None:
        """Takes note of variables that workers hold in common."""
        self._states.know(fingerprints)

    def enter(self, worker: int) -> None:
        """Takes note of a worker that comes back, or comes while the job is in progress."""
        self._states.enter(worker)

    def drop(self, worker: int, now: float) -> None:
        """Takes note that a worker's stream is gone; who waits for its state is given another's."""
        self._pending.pop(worker, None)
        for request in self._states.drop(worker):
            self.ask(request.receiver, None, request.level_will_do, now)

    def leave(self, worker: int, for_good: bool = True) -> None:
        """Takes note that a worker does no more runs."""
        for run, verdict, chunks in self._states.leave(worker, for_good):
            self._tell_verdict(run, verdict, chunks)

    def _tell_verdict(self, run: int, verdict: str | None, chunks: list[bytes]) -> None:
        if verdict is None:
            return
        self._on_event(verdict or f"all workers train the same variables from run {run} on")
        verdict_message = pb.ManifestVerdict(run=run, error=verdict)
        self._streams.tell_all(pb.ToWorker(manifest_verdict=verdict_message))
        for chunk in chunks if not verdict else ():
            self._tell_others(chunk)

    def _tell_others(self, message: bytes) -> None:
        for worker, outbox in self._streams.items():
            if worker != 0:
                outbox.put(message)
