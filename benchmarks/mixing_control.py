"""What the workers of a job of benchmarks.mixing tell one another, beside what they measure.

A file of numbers that all of them have mapped: no strategy is involved, and reading it costs
nothing.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np

FOREVER = 2**62

_POLL_SECONDS = 0.0005
_PAUSED, _LAST_STEP, _FIRST_WORKER = 0, 1, 2


def create(path: pathlib.Path, num_workers: int) -> None:
    """Makes the file of a job."""
    numbers = np.zeros(_FIRST_WORKER + 2 * num_workers, np.int64)
    numbers[_LAST_STEP] = FOREVER
    numbers.tofile(path)


class Control:
    """One worker's view of the file.

    Args:
        path: The file.
        worker: Which worker it is.
        num_workers: How many there are.
        give_up_at: The time.time() until which to wait for others.
    """

    def __init__(
        self, path: pathlib.Path, worker: int, num_workers: int, give_up_at: float
    ) -> None:
        self._numbers = np.memmap(path, np.int64, "r+")
        self._steps = self._numbers[_FIRST_WORKER : _FIRST_WORKER + num_workers]
        self._met = self._numbers[_FIRST_WORKER + num_workers :]
        self._worker = worker
        self._give_up_at = give_up_at

    def meet(self) -> None:
        """Waits until all workers have come here as often as this one."""
        self._met[self._worker] += 1
        self._wait(lambda: self._met.min() >= self._met[self._worker], "all workers to come")

    def note_steps(self, steps: int) -> None:
        """Tells how many steps this worker has done."""
        self._steps[self._worker] = steps

    @property
    def steps_of_all(self) -> int:
        """How many steps all workers have done together."""
        return int(self._steps.sum())

    @property
    def last_step(self) -> int:
        """The step after which workers end."""
        return int(self._numbers[_LAST_STEP])

    @last_step.setter
    def last_step(self, step: int) -> None:
        self._numbers[_LAST_STEP] = step

    @property
    def is_paused(self) -> bool:
        """Whether the model is being tested."""
        return bool(self._numbers[_PAUSED])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Lets all workers wait after their step."""
        self._numbers[_PAUSED] = 1
        try:
            yield
        finally:
            self._numbers[_PAUSED] = 0

    def wait_for_test(self) -> None:
        """Waits until the model has been tested."""
        self._wait(lambda: not self.is_paused, "a test to end")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if time.time() > self._give_up_at:
                raise TimeoutError(
                    f"Expected {what} before the deadline of the benchmark. Raise "
                    "--timeout_seconds if the machine is slow."
                )
            time.sleep(_POLL_SECONDS)
