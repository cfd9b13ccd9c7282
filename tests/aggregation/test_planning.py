"""The thread that plans, and the process that trains a model for it."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tf_syncdist.aggregation.planning import Planning
from tf_syncdist.aggregation.recording import TraceFile
from tf_syncdist.aggregation.training import Training
from tf_syncdist.cutoff import Plan, RoundTimes, traces
from tf_syncdist.cutoff.planning import TrainingRequest

TRACE = traces.of_seconds(np.ones((3, 2)))


def times(run: int) -> RoundTimes:
    """Returns a round of two workers."""
    return RoundTimes(run, np.array([1.0, 2.0]), 2.0, np.ones(2, bool))


def until(there: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Waits until a function returns something true, and returns that.

    A training has the lowest priority: on a busy machine it may take a minute to start.
    """
    deadline = time.monotonic() + seconds
    while not (value := there()):
        assert time.monotonic() < deadline, "what was waited for has not come"
        time.sleep(0.01)
    return value


class Planner:
    """Notes what it is told, and plans when it may."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.may_plan = threading.Event()
        self.request: TrainingRequest | None = None
        self.failures: list[str] = []

    def observe(self, told: RoundTimes) -> None:
        self.seen.append(told.run)

    def plan(self) -> Plan:
        assert self.may_plan.wait(60)
        return Plan(len(self.seen) % 2 + 1, np.inf, "of the test")

    def training_request(self) -> TrainingRequest | None:
        request, self.request = self.request, None
        return request

    def training_failed(self, reason: str) -> None:
        self.failures.append(reason)


class Heard:
    """What came of it."""

    def __init__(self) -> None:
        self.plans: list[tuple[int, Plan]] = []
        self.failures: list[tuple[str, Exception]] = []
        self.events: list[str] = []

    def planning(self, planner: object, **more: Any) -> Planning:
        """Starts the thread."""
        return Planning(
            planner,
            2,
            lambda run, plan: self.plans.append((run, plan)),
            lambda what, error: self.failures.append((what, error)),
            self.events.append,
            **more,
        )


def test_all_rounds_are_seen_and_it_is_planned_for_the_newest() -> None:
    planner, heard = Planner(), Heard()
    with heard.planning(planner) as planning:
        planning.tell(times(0))
        until(lambda: planner.seen)
        for run in (1, 2, 5):
            planning.tell(times(run))
        planner.may_plan.set()
        until(lambda: len(heard.plans) == 2)
    assert planner.seen == [0, 1, 2, 5]
    # Infinity is no time that anybody expects.
    plans = [(1, Plan(2, None, "of the test")), (6, Plan(1, None, "of the test"))]
    assert heard.plans == plans and not heard.failures
    planning.close()


@pytest.mark.parametrize("count", [0, 3, 1.5, True, "two", None])
def test_a_planner_that_plans_nonsense_is_not_asked_again(count: object) -> None:
    planner, heard = Planner(), Heard()
    planner.plan = lambda: Plan(count, None, "")
    with heard.planning(planner) as planning:
        planning.tell(times(0))
        until(lambda: heard.failures)
        planning.tell(times(1))
    assert [what for what, _ in heard.failures] == ["plan"] and not heard.plans
    assert planner.seen == [0]


def test_a_trace_is_written_at_the_end_and_what_hinders_that_is_said_once(tmp_path: Path) -> None:
    heard = Heard()
    path = tmp_path / "trace.npz"
    with heard.planning(None, trace=TraceFile(str(path), 2, heard.events.append)) as planning:
        planning.tell(times(0))
        planning.tell(times(1))
        planning.close(60)
    assert traces.load(path).num_rounds == 2 and not heard.events
    file = TraceFile(str(tmp_path / "none" / "trace.npz"), 2, heard.events.append)
    file.observe(times(0))
    file.save()
    file.save()
    (event,) = heard.events
    assert "could not be written" in event and "none" in event


# Training.


def script(text: str) -> list[str]:
    """Returns the command of a program."""
    return [sys.executable, "-c", textwrap.dedent(text)]


def result_of(training: Training) -> object:
    """Trains, and returns what comes of it."""
    training.start(TrainingRequest(TRACE, 7))
    assert training.is_running
    return until(training.poll)


def test_a_training_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
        import os, sys, pathlib, time
        deadline = time.monotonic() + 60
        while os.nice(0) != 19 and time.monotonic() < deadline:
            time.sleep(0.01)
        flags = dict(a[2:].split("=") for a in sys.argv[1:])
        from tf_syncdist.cutoff import traces
        print(traces.load(flags["trace"]).num_rounds, flags["seed"], os.nice(0), "rounds")
        print("TF_CONFIG" in os.environ, os.environ["CUDA_VISIBLE_DEVICES"])
        pathlib.Path({str(tmp_path / "where")!r}).write_text(flags["trace"])
        sys.exit(3)
    """
    os.environ["TF_CONFIG"] = "{}"
    try:
        with Training(command=script(program)) as training:
            why = result_of(training)
            assert not training.is_running
    finally:
        del os.environ["TF_CONFIG"]
    assert why == "exit code 3: 3 7 19 rounds\nFalse -1"
    assert not Path((tmp_path / "where").read_text()).parent.exists()


def test_a_training_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    program = f"""
        import os, pathlib, time
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        time.sleep(100)
    """
    with Training(3.0, script(program)) as training:
        assert result_of(training) == "it took longer than 3 s"
    until(lambda: not is_alive(tmp_path / "pid"))


def test_a_training_that_makes_no_model_is_a_failure() -> None:
    with Training(command=script("pass")) as training:
        assert "model.npz" in result_of(training)


def test_the_planner_is_told_that_there_will_be_no_model() -> None:
    planner, heard = Planner(), Heard()
    planner.may_plan.set()
    planner.request = TrainingRequest(TRACE, 0)
    training = Training(command=script("raise SystemExit('no luck')"))
    with heard.planning(planner, training=training) as planning:
        planning.tell(times(0))
        until(lambda: planner.failures)
        # Rounds go on meanwhile, and after it.
        planning.tell(times(1))
        until(lambda: len(heard.plans) == 2)
    assert planner.failures == ["exit code 1: no luck"]
    assert len(heard.events) == 2 and "no luck" in heard.events[1]


def test_a_training_ends_with_the_service_however_that_ends(tmp_path: Path) -> None:
    child = f"""
        import os, pathlib, time
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        time.sleep(100)
    """
    service = f"""
        import os, sys, time, pathlib
        import numpy as np
        from tf_syncdist.aggregation.training import Training
        from tf_syncdist.cutoff import traces
        from tf_syncdist.cutoff.planning import TrainingRequest
        training = Training(command={script(child)!r})
        training.start(TrainingRequest(traces.of_seconds(np.ones((3, 2))), 0))
        path = pathlib.Path({str(tmp_path / "pid")!r})
        while not (path.exists() and path.read_text()):
            time.sleep(0.01)
        os._exit(1)
    """
    assert subprocess.run(script(service), timeout=120, check=False).returncode == 1
    until(lambda: not is_alive(tmp_path / "pid"))


def is_alive(path: Path) -> bool:
    """Returns whether the process whose number is in a file is still there."""
    try:
        status = Path(f"/proc/{int(path.read_text())}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
