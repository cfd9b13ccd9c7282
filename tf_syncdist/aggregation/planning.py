"""What is done with every round that is over, while workers compute for the next one."""

import collections
import logging
import math
import threading
import time
from collections.abc import Callable

from tf_syncdist.aggregation.recording import TraceFile
from tf_syncdist.aggregation.training import Training
from tf_syncdist.cutoff import Plan, Planner, RoundTimes

_log = logging.getLogger("tf_syncdist")

# A planner that is slower than the rounds does not keep more of them waiting.
_MOST_WAITING = 1000

# How often it is looked whether a model is trained, or a trace is to be written.
_LOOK_SECONDS = 0.5


class Planning:
    """A thread that shows rounds that are over to a planner, and hands on what it plans.

    Rounds never wait for it. If it cannot keep up, it plans for the newest round only.

    Args:
        planner: The policy's planner; `None` if it has none.
        num_workers: How many workers the job has.
        on_plan: Called with a run and the plan for the first round from it on.
        on_failure: Called with what the planner was to do and what came of it; it is not asked any
            more.
        on_event: Called with one line for the service's log.
        trace: Where rounds are recorded, if they are to be.
        training: Has models trained that the planner asks for.
    """

    def __init__(
        self,
        planner: Planner | None,
        num_workers: int,
        on_plan: Callable[[int, Plan], None],
        on_failure: Callable[[str, Exception], None],
        on_event: Callable[[str], None],
        trace: TraceFile | None = None,
        training: Training | None = None,
    ) -> None:
        self._planner = planner
        self._num_workers = num_workers
        self._on_plan = on_plan
        self._on_failure = on_failure
        self._on_event = on_event
        self._trace = trace
        self._training = training or Training()
        self._waiting: collections.deque[RoundTimes] = collections.deque(maxlen=_MOST_WAITING)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tf_syncdist_plans", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Planning":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self, times: RoundTimes) -> None:
        """Tells of a round that is over; never blocks."""
        with self._changed:
            self._waiting.append(times)
            self._changed.notify()

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Ends the thread, and a training with it; the trace is written. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_seconds)

    # How.

    def _work(self) -> None:
        try:
            while (found := self._next()) is not None:
                for times in found:
                    if self._trace is not None:
                        self._trace.observe(times)
                    self._do("observe", lambda planner, times=times: planner.observe(times))
                if found:
                    self._do("plan", lambda planner, run=found[-1].run: self._plan(planner, run))
                self._do("ask for a model", self._train)
                if self._trace is not None:
                    self._trace.save_if_due(time.monotonic())
        except Exception:  # noqa: BLE001 - rounds go on without plans
            _log.exception("in the thread that plans rounds")
        finally:
            self._training.close()
            if self._trace is not None:
                self._trace.save()

    def _next(self) -> list[RoundTimes] | None:
        """Returns the rounds that are over by now, perhaps none; `None` at the end."""
        looks = self._trace is not None or self._training.is_running
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait(_LOOK_SECONDS if looks else None)
            if self._closed and not self._waiting:
                return None
            found = list(self._waiting)
            self._waiting.clear()
            return found

    def _do(self, what: str, do: Callable[[Planner], None]) -> None:
        if self._planner is None:
            return
        try:
            do(self._planner)
        except Exception as e:  # noqa: BLE001 - no policy is worth a job
            _log.exception("while a cutoff policy was to %s", what)
            self._planner = None
            self._on_failure(what, e)

    def _plan(self, planner: Planner, run: int) -> None:
        self._on_plan(run + 1, _checked(planner.plan(), self._num_workers))

    def _train(self, planner: Planner) -> None:
        ask = getattr(planner, "training_request", None)
        if ask is None:
            return
        if not self._training.is_running:
            request = ask()
            if request is None:
                return
            self._on_event("a model of the workers' run-times is being trained")
            self._training.start(request)
        trained = self._training.poll()
        if trained is None:
            return
        if isinstance(trained, str):
            planner.training_failed(trained)
            self._on_event(f"no model of the workers' run-times was trained: {trained}")
        else:
            self._on_event(
                f"a model of the workers' run-times is trained: {_accept(planner, trained)}"
            )


def _accept(planner: Planner, model: object) -> str:
    try:
        return planner.accept(model)
    except ValueError as e:
        planner.training_failed(str(e))
        return str(e)


def _checked(plan: Plan, num_workers: int) -> Plan:
    count, expected, reason = plan
    if isinstance(count, bool) or int(count) != count or not 1 <= count <= num_workers:
        raise ValueError(
            f"Expected a cutoff from 1 to the number of workers, {num_workers}. Received: {count}."
        )
    if expected is not None and not math.isfinite(expected):
        expected = None
    return Plan(int(count), None if expected is None else float(expected), str(reason))
