"""A worker's runs by its own clock: what it does around a step to mix its model with others.

The graph calls it; it knows no TensorFlow.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from tf_syncdist.errors import SyncDistError
from tf_syncdist.observability.mixing_reports import Exchanges, MixingReport
from tf_syncdist.strategies.exchangers import Exchanger
from tf_syncdist.strategies.recorded import recorded
from tf_syncdist.strategies.run_types import LocalReport
from tf_syncdist.transport.gossiping import distance
from tf_syncdist.transport.session import Session
from tf_syncdist.transport.states import Spec


class MixedModel(Protocol):
    """The variables of a training function that are mixed."""

    specs: list[Spec]

    @property
    def is_alive(self) -> bool:
        """Whether the variables are still there."""
        ...

    def is_like(self, other: "MixedModel") -> bool:
        """Returns whether it is about the same variables."""
        ...

    def has(self, variable: object) -> bool:
        """Returns whether a variable of the program's is one of them."""
        ...

    def read_own(self) -> list[np.ndarray]:
        """Returns the values with which this worker trains, as flat arrays."""
        ...

    def read_common(self) -> list[np.ndarray]:
        """Returns the values that everything outside of training sees, as flat arrays."""
        ...

    def assign(self, values: Sequence[np.ndarray], own: bool) -> None:
        """Writes what everything outside of training sees, and what this worker trains with."""
        ...


class FreeRuns:
    """Takes a worker through its runs; no run waits for another worker.

    The program may look at the model on any thread, also during a run.

    Args:
        session: The connection to the service.
        exchanger: Mixes models.
        period: Models are mixed in one of so many runs.
        fit: Returns how many fits have begun; every worker counts alike.
        on_notice: Called with one line for the user.
        clock: Returns the time in seconds; monotonic.

    Attributes:
        run: How many runs have begun.
        error: What has ended a run, if anything has.
    """

    def __init__(
        self,
        session: Session,
        exchanger: Exchanger,
        period: int,
        fit: Callable[[], int],
        on_notice: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = 0
        self.error: BaseException | None = None
        self._session = session
        self._exchanger = exchanger
        self._period = period
        self._fit = fit
        self._on_notice = on_notice
        self._clock = clock
        # Exchangers hold one conversation at a time. Whoever talks waits for its answer with a
        # deadline, and so does whoever waits for the lock. A run that begins may have to look.
        self._lock = threading.RLock()
        self._last: MixedModel | None = None
        # Which centre it is: the fit in which it began, and how often the program has written the
        # variables itself within it.
        self._key: tuple[int, int] | None = None
        # In which fit this worker's program was when it began with it.
        self._begun_in = 0
        self._former: list[MixedModel] = []
        self._is_void = False
        self._is_behind = False
        self._is_running = False
        self._distance: float | None = None
        self._first_end = self._last_end = 0.0

    # Called by the graph.

    def begin(self, model: MixedModel) -> np.bool_:
        """Begins a run; returns whether models are mixed in it."""
        with self._lock, recorded(self):
            self._session.check()
            known = self._model
            if known is None or not known.is_like(model):
                self._check_new(known, model)
                # The other variables may be in this model, too.
                self.settle()
                self._start(model, self._next_key(is_new=True))
            elif self._is_void:
                self._start(model, self._next_key(is_new=False))
            self._last = model
            due = np.bool_(self.run % self._period == 0)
            self.run += 1
            self._is_behind = self._is_running = True
            return due

    def exchange(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns what others say to this worker's values; each array as it was shaped."""
        with self._lock, recorded(self):
            found = self._exchanger.exchange(self.run, [a.reshape(-1) for a in arrays])
            return [f.reshape(a.shape) for f, a in zip(found, arrays, strict=True)]

    def finish(self) -> None:
        """Takes note that a run is done."""
        self._is_running = False
        self._last_end = self._clock()
        self._first_end = self._first_end or self._last_end

    # Called from outside of runs.

    def settle(self) -> None:
        """Lets everything outside of training see what all workers have come to."""
        with self._lock:
            if self._is_behind:
                self.refresh()

    def refresh(self) -> None:
        """As `settle`, also if only other workers have trained since."""
        with self._lock:
            self._look()

    def trains(self, variable: object) -> bool:
        """Returns whether a variable of the program's is in the model that is trained now."""
        model = self._model
        return model is not None and model.has(variable)

    def written(self) -> None:
        """Takes note that the program has written variables itself; all is mixed anew from them."""
        # Without the lock: who looks just now, on another thread, is to see it and write nothing.
        self._is_void = True

    @property
    def runs_done(self) -> tuple[int, int]:
        """How many runs this worker has done, and how many of them it computed: all."""
        return self.run, self.run

    def answer_state_requests(self) -> None:
        """Nobody asks: who comes late begins with the centre, or with a partner's model."""

    def report(self) -> LocalReport:
        """Returns this worker's counts as other strategies have them: every run is its own."""
        config = self._session.config
        seconds = self._last_end - self._first_end
        return LocalReport(config.worker, config.num_workers, self.run, self.run, 0, 0, 0, seconds)

    def mixing_report(self) -> MixingReport:
        """Returns what has become of the models."""
        with self._lock:
            self.settle()
            return self._report()

    # How.

    def _look(self) -> None:
        model = self._model
        if model is None or self._is_void or self.error is not None or self._session.has_failed:
            return
        # What a run in progress comes to is not in it.
        self._is_behind = self._is_running
        try:
            own = model.read_own()
            common = self._exchanger.consensus(self.run, own, self._is_running)
            self._distance = distance(own, common)
        except SyncDistError as e:
            if not self._session.has_failed:
                raise
            self._on_notice(f"the model is as this worker knew it last: {e}")
            return
        if not self._is_void:
            model.assign(common, own=False)

    def _report(self) -> MixingReport:
        config = self._session.config
        workers: tuple[Exchanges, ...] = ()
        centre_bytes = 0
        if config.centre and not self._session.has_failed:
            reply = self._session.report()
            centre_bytes = reply.centre_bytes
            workers = tuple(
                Exchanges(
                    w.mixed + w.too_stale,
                    w.mixed,
                    too_stale=w.too_stale,
                    staleness_sum=w.staleness_sum,
                    staleness_max=w.staleness_max,
                )
                for w in reply.workers
            )
        return MixingReport(
            config.worker,
            config.num_workers,
            self.run,
            self._exchanger.exchanges(),
            workers,
            self._distance,
            centre_bytes,
        )

    @property
    def _model(self) -> MixedModel | None:
        """What was trained last, unless the program has thrown it away."""
        return self._last if self._last is not None and self._last.is_alive else None

    def _check_new(self, known: MixedModel | None, model: MixedModel) -> None:
        """Takes note of another set of variables.

        Raises:
            ValueError: If the program goes to and fro between two of them.
        """
        if known is not None:
            self._former = [m for m in (*self._former, known) if m.is_alive]
        if self._key is not None and any(m.is_like(model) for m in self._former):
            if self._key[0] == self._fit():
                names = ", ".join(name for name, _, _ in model.specs[:3])
                raise ValueError(
                    "Expected a program that trains one set of variables, and perhaps another one "
                    "after it, because models are mixed as a whole. Received: one that goes to and "
                    f"fro between sets, and is back at {names}. Update all variables in one "
                    "function that is given to strategy.run."
                )

    def _next_key(self, is_new: bool) -> tuple[int, int]:
        """Returns which training begins: of a new model, or of one that the program has written."""
        fit, key = self._fit(), self._key
        if key is None or fit > key[0] or (is_new and fit < key[0]):
            return fit, 0
        if is_new or (fit == key[0] and fit == self._begun_in):
            return fit, key[1] + 1
        # It has joined others that were ahead in the program, and comes now to where they were:
        # what it has written, they had written before.
        return key

    def _start(self, model: MixedModel, key: tuple[int, int]) -> None:
        # What is written from here on is not in what this begins with.
        self._is_void = False
        self._begun_in = self._fit()
        values, self._key = self._exchanger.start(model.specs, model.read_common(), key)
        model.assign(values, own=True)
