"""Hands the state of one worker on to others. One lock of the job's guards it."""

from collections.abc import Callable

from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.manifests import Variable
from tf_syncdist.aggregation.outbox import Refused, Streams
from tf_syncdist.aggregation.states import States
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# More than any model has; a manifest takes time and memory by their number.
_MOST_VARIABLES = 100_000


class StateRelay:
    """Who gives whose variables to whom, and their way through the service.

    Args:
        num_workers: How many workers the job has.
        streams: The connected workers.
        position: Returns the run that a worker is in or about to begin.
        on_event: Called with one line for the service's log.
        most_bytes: How many bytes of variables are kept before all workers are there.
    """

    def __init__(
        self,
        num_workers: int,
        streams: Streams,
        position: Callable[[int], int],
        on_event: Callable[[str], None],
        most_bytes: int = 2**62,
    ) -> None:
        self._states = States(num_workers, most_bytes)
        self._streams = streams
        self._position = position
        self._on_event = on_event

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

    def ask(self, receiver: int, wanted: int | None, level_will_do: bool) -> None:
        """Asks an up-to-date worker for its state; see `States.request`."""
        found = self._states.request(receiver, self._streams, self._position, wanted, level_will_do)
        if found is None:
            raise invalid(
                f"Expected a connected worker that is further than worker {receiver}, to take over "
                "its state. Received: a request while there is none (any more)."
            )
        request, giver = found
        self._on_event(f"worker {giver} gives its state to worker {receiver}")
        self._streams.tell(giver, pb.ToWorker(give_state=pb.GiveState(request=request)))

    def drop(self, worker: int) -> None:
        """Takes note that a worker's stream is gone; who waits for its state is given another's."""
        for request in self._states.drop(worker):
            try:
                self.ask(request.receiver, None, request.level_will_do)
            except Refused as e:
                self._streams[request.receiver].close(e)

    def leave(self, worker: int) -> None:
        """Takes note that a worker does no more runs."""
        for run, verdict, chunks in self._states.leave(worker):
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
