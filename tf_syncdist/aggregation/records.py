"""What the rounds are told and what they answer. Pure."""

import enum
from typing import NamedTuple

from tf_syncdist.cutoff import RoundTimes


class Fate(enum.IntEnum):
    """What became of a worker's part in a round; the numbers are those of the contract."""

    CONTRIBUTED = 1
    LATE = 2
    REPLAYED = 3
    MISSED = 4


class Verdict(enum.Enum):
    """What is to be done with the values that came with a contribution."""

    ADD = "add"
    LATE = "late"
    DUPLICATE = "duplicate"


class SliceKey(NamedTuple):
    """Names one slice: which run, which exchange in it, which slice of that."""

    run: int
    exchange: int
    slice: int


class SliceSpec(NamedTuple):
    """What workers must agree on about a slice."""

    num_slices: int
    dtype: str
    elements: int
    layout: int


class Closed(NamedTuple):
    """A slice that has just been closed."""

    key: SliceKey
    contributors: tuple[int, ...]
    reason: str


class Receipt(NamedTuple):
    """The answer to a contribution: on ADD, add the values before acting on `closed`."""

    verdict: Verdict
    closed: tuple[Closed, ...]
    reason: str


class RunOver(NamedTuple):
    """A run that is over, and how many exchanges it had."""

    run: int
    exchanges: int


class Progress(NamedTuple):
    """The answer to a finished run.

    Args:
        over: The runs that are over now.
        evicted: Those that may be forgotten.
        times: How long the workers took for the rounds that ended now, as far as that is known.
    """

    over: tuple[RunOver, ...]
    evicted: tuple[int, ...]
    times: tuple[RoundTimes, ...] = ()


class RoundError(ValueError):
    """A message that a correct worker cannot send."""


class WorkerCounts:
    """Counters of one worker."""

    def __init__(self) -> None:
        self.fates = dict.fromkeys(Fate, 0)
        self.partly_used = 0
        self.nonfinite = 0
        self.delay_sum = 0.0
        self.delays = 0

    @property
    def replayed(self) -> int:
        """Rounds applied without computing, missed ones included."""
        return self.fates[Fate.REPLAYED] + self.fates[Fate.MISSED]

    @property
    def mean_delay_seconds(self) -> float:
        """Mean delay behind the first worker, over the rounds for which this one computed."""
        return self.delay_sum / self.delays if self.delays else 0.0
