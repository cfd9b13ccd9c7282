"""What a worker's runs are made of: what a run does, where it happens, and what it leaves."""

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Mode(enum.IntEnum):
    """What a run does; the graph branches on it.

    Where updates are made in the next run, that run continues the one before: it applies that one's
    result and computes.
    """

    COMPUTE = 0
    REPLAY = 1
    SKIP = 2
    CONTINUE = 3


class LocalReport(NamedTuple):
    """One worker's own counts.

    Args:
        worker: Index of the worker.
        num_workers: How many workers the job has.
        rounds: Rounds that this worker has taken part in, one way or another:
            contributed + late + replayed.
        contributed: Rounds whose every slice has its values.
        late: Rounds for which it computed, and at least one slice was closed without it.
        replayed: Rounds whose result it applied without computing.
        missed: Rounds among the replayed ones that it skipped by taking over another worker's
            state.
        wall_seconds: Time from the end of its first run to the end of its last.
        nonfinite: Rounds in which its gradients were not finite, if it was to look at them.
    """

    worker: int
    num_workers: int
    rounds: int
    contributed: int
    late: int
    replayed: int
    missed: int
    wall_seconds: float
    nonfinite: int = 0


class RunSite(Protocol):
    """One place in a program where training runs happen (one trace of a replica function)."""

    replayable: bool
    unlike_replay: str
    synchronised: bool
    outputs: list[np.ndarray] | None

    @property
    def num_deferred_slices(self) -> int:
        """How many slices there are if the update is made in the next run; 0 if it is not."""
        ...

    def name_of(self, exchange: int, tensor: int) -> str:
        """Returns the name of the variable that a tensor of an exchange is for, if known."""
        ...


class StateStore(Protocol):
    """Where the variables are that workers hold alike."""

    def unsynchronised(self, site: RunSite) -> list[tuple[str, str, tuple[int, ...]]]:
        """Returns the specs of a site's variables that are not yet common to all workers."""
        ...

    def read_new(self) -> list[np.ndarray]:
        """Returns the values of what `unsynchronised` returned last."""
        ...

    def assign_new(self, values: Sequence[np.ndarray]) -> None:
        """Writes the values of what `unsynchronised` returned last."""
        ...

    def commit(self) -> None:
        """Takes note that what `unsynchronised` returned last is now common."""
        ...

    def specs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Returns the specs of all common variables."""
        ...

    def read(self) -> list[np.ndarray]:
        """Returns the values of all common variables."""
        ...

    def assign(self, values: Sequence[np.ndarray]) -> None:
        """Writes the values of all common variables."""
        ...
