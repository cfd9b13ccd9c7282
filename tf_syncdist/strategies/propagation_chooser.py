"""Measures a job's first rounds and chooses, alike on all workers, how gradients travel."""

import statistics
from collections.abc import Callable

import numpy as np

from tf_syncdist.propagation.choice import Choice, Measured, choose
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.session import Session

# The first rounds trace, connect and warm up.
_FIRST_ROUND = 4
_DECIDES_AT = 16


class PropagationChooser:
    """Lets gradients travel in the order of backpropagation until it is known what is better.

    All workers choose before the same run, from the same figures. A worker that comes later is told
    these by the service, which keeps them for the whole job.

    Args:
        session: The connection to the service.
        say: Tells the user something, once for the job.
    """

    def __init__(self, session: Session, say: Callable[[str], None]) -> None:
        self._session = session
        self._say = say
        self._choice: Choice | None = None
        self._compute: list[float] = []
        self._exposed: list[float] = []

    @property
    def in_order(self) -> bool:
        """Whether gradients travel in the order of backpropagation, as in the first rounds."""
        return self._choice is None or not self._choice.by_priority

    def begin(self, run: int, num_slices: int) -> None:
        """Chooses, where that is due; waits for the other workers then."""
        if self._choice is not None or run < _DECIDES_AT:
            return
        job = self._session.config
        mine = np.zeros((job.num_workers, 3))
        if self._exposed:
            medians = (statistics.median(self._compute), statistics.median(self._exposed))
            mine[job.worker] = (*medians, 1.0)
        found = self._session.gather(pb.PROPAGATION, 0, run, values=mine.reshape(-1))
        rows = found.values.reshape(-1, 3)
        self._choice = choose([Measured(c, e) for c, e, there in rows if there], num_slices)
        name = "by priority" if self._choice.by_priority else "in the order of backpropagation"
        self._say(f"gradients travel {name}: {self._choice.reason}")

    def measured(self, run: int, compute_seconds: float, exposed_seconds: float) -> None:
        """Takes note of what a round has cost."""
        if self._choice is None and run >= _FIRST_ROUND:
            self._compute.append(compute_seconds)
            self._exposed.append(exposed_seconds)
