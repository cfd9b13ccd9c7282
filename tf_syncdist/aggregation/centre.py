"""A centre with which workers mix their models: one shard of it, and how it comes to be there.

The service makes no variables itself: a worker gives them, and a service that was started again
asks the one that has received the newest ones. No worker waits for another one but where there is
no centre yet. One lock of the job's guards all this; a slice has its own.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.centre_slices import DTYPES, CentreSlice, MixCounts
from tf_syncdist.aggregation.manifests import Variable, first_difference
from tf_syncdist.aggregation.memory import WorkerMemory
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.mixing.centre_policies import CentrePolicy
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# As many as a round may have, and for the same reason.
_MOST_SLICES = 2**18
# A slice takes about as much memory as this besides its values.
_SLICE_BYTES = 4096
_READS = (pb.CENTRE_READ,)


class Centre:
    """One shard's part of one centre.

    Args:
        key: Which centre it is: its training and its revision.
        policy: How it takes in models.
        streams: The connected workers.
        giver: Returns the worker that has to give it; `None` if any may that wants it.
        holders: Returns which version each worker has of it that has one from the service before
            this one.
        on_complete: Called when it is there, with one line for the service's log.
        most_bytes: How many bytes it may have.
        counts: For every worker, what is counted.
    """

    def __init__(
        self,
        key: tuple[int, int],
        policy: CentrePolicy,
        streams: Streams,
        giver: Callable[[], int | None],
        holders: Callable[[], Mapping[int, int]],
        on_complete: Callable[[str], None],
        most_bytes: int,
        counts: Sequence[MixCounts],
    ) -> None:
        self._key = key
        self._policy = policy
        self._streams = streams
        self._due_giver = giver
        self._holders = holders
        self._on_complete = on_complete
        self._most_bytes = most_bytes
        self._counts = counts
        self._reference: tuple[int, tuple[Variable, ...]] | None = None
        self._layout = 0
        self._bytes_left = 0
        self._slices: list[CentreSlice | None] = []
        # The workers whose variables are those of the centre, on the streams that they have now.
        self._open: set[int] = set()
        self._waiting: set[int] = set()
        self._giver: int | None = None

    @property
    def is_there(self) -> bool:
        """Whether it has been given."""
        return self._reference is not None and None not in self._slices

    @property
    def nbytes(self) -> int:
        """How many bytes its values have."""
        return sum(part.nbytes for part in self._slices if part is not None)

    def is_of(self, message: pb.CentreOpen) -> bool:
        """Returns whether it has these variables."""
        same = self._layout == message.layout and len(self._slices) == message.num_slices
        return same and self._reference[1] == _variables(message)

    def waits(self) -> tuple[int, ...]:
        """Returns the worker that has to give a centre for which others wait, if they do."""
        if not self._waiting or self.is_there:
            return ()
        return (self._chosen(),) if self._giver is None else (self._giver,)

    def open(self, worker: int, message: pb.CentreOpen) -> None:
        """Takes note of the variables that a worker mixes, and tells it whether there are any.

        Raises:
            Refused: If it wants more than the service may keep.
        """
        variables = _variables(message)
        if self._reference is None:
            self._begin(worker, message, variables)
        reference, expected = self._reference
        error = first_difference({reference: expected, worker: variables}, reference)
        cut = (message.layout, message.num_slices)
        if not error and cut != (self._layout, len(self._slices)):
            error = (
                f"Expected every worker to cut its variables as worker {reference} does. Received: "
                f"another cut from worker {worker}. Use the same version of tf_syncdist, and the "
                "same arguments, on every worker."
            )
        if error:
            self._tell(worker, pb.CentreState(error=error))
            return
        self._open.add(worker)
        if self.is_there:
            self._tell(worker, pb.CentreState(there=True))
            return
        self._waiting.add(worker)

    def leave(self, worker: int) -> None:
        """Takes note that a worker has another stream, or another centre, or is gone."""
        self._open.discard(worker)
        self._waiting.discard(worker)
        if worker == self._giver and not self.is_there:
            self._drop()

    def give(self, worker: int, request: pb.CentreRequest, values: np.ndarray) -> None:
        """Takes a slice of the centre from the worker that was asked for it.

        Raises:
            Refused: If it was not asked, or gives more than it should.
        """
        self._check(worker, request)
        if worker != self._giver:
            raise invalid(
                "Expected the centre from the worker that was asked for it. Received: slice "
                f"{request.slice} of it from worker {worker}."
            )
        if self._slices[request.slice] is not None or values.nbytes > self._bytes_left:
            raise invalid(
                f"Expected each slice of the centre once, and {self._bytes_left} bytes more at "
                f"most. Received: slice {request.slice} with {values.nbytes} bytes from worker "
                f"{worker}."
            )
        self._bytes_left -= values.nbytes
        counts = self._counts if request.slice == 0 else None
        self._slices[request.slice] = CentreSlice(request, values, self._policy, counts)
        if self.is_there:
            self._complete(worker)

    def claim(self, worker: int, request: pb.CentreRequest) -> CentreSlice:
        """Returns the slice that a request is about.

        Raises:
            Refused: If there is none, or it is another one than the worker believes.
        """
        self._check(worker, request)
        part = self._slices[request.slice]
        if part is None or not part.fits(request):
            raise invalid(
                "Expected a slice of the centre that is there, with its dtype and size. Received: "
                f"slice {request.slice} with {request.elements} value(s) of dtype {request.dtype} "
                f"from worker {worker}."
            )
        return part

    def choose(self) -> None:
        """Asks a worker for the centre, if there is none and nobody was asked."""
        if self._giver is not None or not self._waiting or self.is_there:
            return
        chosen = self._chosen()
        if chosen in self._waiting:
            self._giver = chosen
            self._tell(chosen, pb.CentreState(give=True))
            if not self._slices:
                self._complete(chosen)

    # How.

    def _begin(self, worker: int, message: pb.CentreOpen, variables: tuple[Variable, ...]) -> None:
        nbytes = sum(v.elements for v in variables) * 8 + message.num_slices * _SLICE_BYTES
        if message.num_slices > _MOST_SLICES or nbytes > self._most_bytes:
            raise invalid(
                f"Expected a centre of at most {_MOST_SLICES} slices and {self._most_bytes} bytes "
                "(--max_worker_bytes of the service). Received: one of "
                f"{message.num_slices} slices and up to {nbytes} bytes from worker {worker}."
            )
        self._reference = (worker, variables)
        self._layout = message.layout
        self._slices = [None] * message.num_slices
        self._drop()

    def _drop(self) -> None:
        """Forgets what was given of a centre that is not whole."""
        self._giver = None
        self._slices = [None] * len(self._slices)
        self._bytes_left = sum(v.elements for v in self._reference[1]) * 8

    def _chosen(self) -> int:
        """Returns who is to give the centre; it may not be there yet."""
        holders = self._holders()
        if holders:
            return max(holders, key=lambda w: (holders[w], -w))
        due = self._due_giver()
        return min(self._waiting) if due is None else due

    def _complete(self, worker: int) -> None:
        for one in sorted(self._waiting):
            self._tell(one, pb.CentreState(there=True))
        self._waiting.clear()
        version = sum(part.version for part in self._slices)
        self._on_complete(
            f"worker {worker} has given a centre of {self.nbytes} bytes, after {version} change(s)"
        )

    def _check(self, worker: int, request: pb.CentreRequest) -> None:
        if worker not in self._open or request.layout != self._layout:
            raise invalid(
                "Expected requests about the centre from workers that have said which variables "
                f"theirs are. Received: one about slice {request.slice} from worker {worker}."
            )
        if request.slice >= len(self._slices):
            raise invalid(
                f"Expected a slice below {len(self._slices)}. Received: slice={request.slice} from "
                f"worker {worker}."
            )

    def _tell(self, worker: int, state: pb.CentreState) -> None:
        state.fit, state.revision = self._key
        self._streams.tell(worker, pb.ToWorker(centre_state=state))


def _variables(message: pb.CentreOpen) -> tuple[Variable, ...]:
    return tuple(Variable(v.name, v.dtype, tuple(v.shape)) for v in message.variables)


def values_of(
    request: pb.CentreRequest, payload: memoryview, memory: WorkerMemory | None, worker: int
) -> np.ndarray | None:
    """Returns the values that come with a request, without copying them; `None` for one that reads.

    Raises:
        Refused: If they are not what the request says.
    """
    dtype = DTYPES.get(request.dtype)
    nbytes = request.elements * (dtype.itemsize if dtype is not None else 8)
    data: np.ndarray | None = np.frombuffer(payload, np.uint8)
    if request.HasField("location"):
        data = None
        if memory is not None and nbytes <= wire.MAX_PAYLOAD_BYTES and not payload.nbytes:
            data = memory.read(request.location, nbytes)
    is_read = request.action in _READS
    wanted = 0 if is_read else nbytes
    actions = (pb.CENTRE_READ, pb.CENTRE_MIX, pb.CENTRE_GIVE)
    if dtype is None or request.action not in actions or data is None or data.nbytes != wanted:
        raise invalid(
            f"Expected a known action, and {request.elements} value(s) of float32 or float64 "
            f"unless a slice is only read. Received: action={request.action}, "
            f"dtype={request.dtype}, {payload.nbytes} bytes for slice {request.slice} from worker "
            f"{worker}."
        )
    return None if is_read else data.view(dtype)
