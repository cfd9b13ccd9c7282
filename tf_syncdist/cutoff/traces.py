"""Traces: how long every worker took, round by round, in memory and in a file."""

import collections
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tf_syncdist.cutoff import files
from tf_syncdist.cutoff.planning import RoundTimes
from tf_syncdist.errors import TraceError

_KIND, _VERSION = "trace of run-times", 1


class Trace(NamedTuple):
    """How long every worker took for each of many rounds, in their order; see `RoundTimes`.

    Args:
        seconds: float64, [rounds, num_workers]. NaN where a worker was absent, or late: present,
            and needing more than the round's `closed_seconds`.
        closed_seconds: float64, [rounds].
        present: bool, [rounds, num_workers].
    """

    seconds: np.ndarray
    closed_seconds: np.ndarray
    present: np.ndarray

    @property
    def num_rounds(self) -> int:
        """How many rounds there are."""
        return len(self.seconds)

    @property
    def num_workers(self) -> int:
        """How many workers there are."""
        return self.seconds.shape[1]

    def rounds(self) -> Iterator[RoundTimes]:
        """Returns the rounds one by one, numbered from 0."""
        for run, row in enumerate(
            zip(self.seconds, self.closed_seconds, self.present, strict=True)
        ):
            yield RoundTimes(run, row[0], float(row[1]), row[2])

    def part(self, begin: int, end: int | None = None) -> "Trace":
        """Returns the rounds from `begin` up to, without, `end`."""
        return Trace(*(array[begin:end] for array in self))


def of_seconds(seconds: np.ndarray) -> Trace:
    """Returns the trace of rounds that were all waited for to the end.

    Example:

    >>> trace = of_seconds([[1.0, 2.0, 1.5], [1.1, 1.9, 1.4]])
    >>> trace.closed_seconds
    array([2. , 1.9])
    """
    seconds = np.asarray(seconds, np.float64)
    return checked(Trace(seconds, seconds.max(axis=-1), np.ones(seconds.shape, bool)))


def checked(trace: Trace, num_workers: int | None = None) -> Trace:
    """Returns a trace whose values make sense.

    Args:
        trace: The trace.
        num_workers: Of how many workers it has to be; `None` if that does not matter.

    Raises:
        TraceError: If it is of other workers, or if times are missing, negative, infinite, or NaN
            where a time belongs. The message names the first such round and worker.
    """
    seconds, closed, present = trace
    if seconds.ndim != 2 or 0 in seconds.shape or seconds.dtype != np.float64:
        raise TraceError(
            "Expected `seconds` as float64 of shape [rounds, workers] with a round at least. "
            f"Received: shape {list(seconds.shape)}, {seconds.dtype}."
        )
    if closed.shape != seconds.shape[:1] or closed.dtype != np.float64:
        raise TraceError(
            f"Expected `closed_seconds` as float64, one for each of {len(seconds)} rounds. "
            f"Received: shape {list(closed.shape)}, {closed.dtype}."
        )
    if present.shape != seconds.shape or present.dtype != np.bool_:
        raise TraceError(
            f"Expected `present` as bool of shape {list(seconds.shape)}, as `seconds` has. "
            f"Received: shape {list(present.shape)}, {present.dtype}."
        )
    if num_workers is not None and num_workers != seconds.shape[1]:
        raise TraceError(
            f"Expected a trace of {num_workers} workers, because each is learned by its number. "
            f"Received: a trace of {seconds.shape[1]}. Record one with as many workers."
        )
    _refuse(
        np.isinf(seconds) | (seconds < 0), seconds, "times of 0 seconds or more, below infinity"
    )
    _refuse(~(np.isfinite(closed) & (closed >= 0)), closed, "the time at which each round closed")
    _refuse(
        np.isnan(seconds).all(axis=1),
        closed,
        "at least one worker's time in each round, not only NaN",
    )
    return trace


def save(path: str | os.PathLike, trace: Trace) -> None:
    """Writes a trace to a file.

    Args:
        path: The file, which is replaced if it exists. Traces are .npz files; the ending is not
            appended.
        trace: The trace.

    Raises:
        TraceError: If the trace makes no sense, see `checked`.
    """
    files.save(path, _KIND, _VERSION, checked(trace)._asdict())


def load(path: str | os.PathLike, num_workers: int | None = None) -> Trace:
    """Reads a trace from a file.

    Args:
        path: The file.
        num_workers: Of how many workers it has to be; `None` if that does not matter.

    Raises:
        TraceError: If the file is missing, damaged, something else or of another version, or if the
            trace makes no sense, see `checked`.
    """
    arrays = files.load(path, _KIND, _VERSION, TraceError)
    missing = [name for name in Trace._fields if name not in arrays]
    if missing:
        raise TraceError(
            f"Expected {', '.join(Trace._fields)} in the file of a {_KIND}. "
            f"Received: {str(path)!r} without {', '.join(missing)}. Record the trace again."
        )
    try:
        return checked(Trace(*(arrays[name] for name in Trace._fields)), num_workers)
    except TraceError as e:
        raise TraceError(f"{e} This is about {str(path)!r}.") from e


class Recorder:
    """Collects rounds for a trace.

    Args:
        num_workers: How many workers the job has.
        max_rounds: How many rounds are kept, the newest ones. 2,000 are enough to learn from; a
            round takes 9 bytes per worker.
    """

    def __init__(self, num_workers: int, max_rounds: int = 10_000) -> None:
        self._num_workers = num_workers
        self._rounds: collections.deque[RoundTimes] = collections.deque(maxlen=max_rounds)

    def __len__(self) -> int:
        return len(self._rounds)

    def observe(self, times: RoundTimes) -> None:
        """Adds a round in which anybody had a time; another one tells nothing."""
        if not np.isnan(times.seconds).all():
            self._rounds.append(times)

    def clear(self) -> None:
        """Forgets all rounds."""
        self._rounds.clear()

    def last(self, count: int) -> list[RoundTimes]:
        """Returns the newest rounds, no more than `count`, in their order."""
        return list(self._rounds)[-count:]

    def trace(self) -> Trace:
        """Returns the rounds so far.

        Raises:
            TraceError: If there is none, or if they make no sense, see `checked`.
        """
        shape = (len(self._rounds), self._num_workers)
        return checked(
            Trace(
                np.array([times.seconds for times in self._rounds], np.float64).reshape(shape),
                np.array([times.closed_seconds for times in self._rounds], np.float64),
                np.array([times.present for times in self._rounds], bool).reshape(shape),
            )
        )


def _refuse(wrong: np.ndarray, values: np.ndarray, expected: str) -> None:
    if wrong.any():
        first = [int(i) for i in np.argwhere(wrong)[0]]
        place = f"round {first[0]}" + (f", worker {first[1]}" if len(first) > 1 else "")
        raise TraceError(
            f"Expected {expected}. Received: {values[tuple(first)]} in {place}. "
            "NaN stands for a worker that was late or absent, for nothing else. "
            "Record the trace again."
        )
