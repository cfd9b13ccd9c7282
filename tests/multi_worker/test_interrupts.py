"""Ctrl-C and SIGTERM end a worker soon and quietly, in every state, and the others go on."""

import os
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import JobResult, Jobs, run_job

pytestmark = pytest.mark.timeout(560)

STATES = ["start", "step", "evaluate", "native", "receive", "custom", "stay"]
VICTIMS = {state: number for number, state in enumerate(STATES, start=2)}
WORKERS = 2 + len(STATES)
# Five seconds where the machine is not stalled; what a victim waits for would take 90.
SOON = 25
SIGNALS = {"terminated": signal.SIGTERM, "interrupted": signal.SIGINT}


def status(state: str, number: signal.Signals) -> int:
    # Python ends itself by the signal if nobody catches a KeyboardInterrupt. Where that cannot
    # come about, and at the end of a program, the status says the same as a shell puts it.
    raised = number == signal.SIGINT and state not in ("native", "stay")
    return -number if raised else 128 + number


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {
        name: {
            "workers": WORKERS,
            "ps": 1,
            # Two of them wait for a state, each for a worker that is not up to date itself.
            "arguments": {"signal": int(number), "parts": list(VICTIMS.items())},
            "statuses": {f"worker {VICTIMS[s]}": status(s, number) for s in STATES},
        }
        for name, number in SIGNALS.items()
    }
    for name, number in SIGNALS.items():
        wanted[f"{name}_chief"] = {
            "workers": 2,
            "arguments": {
                "signal": int(number),
                "parts": [("step", 0)],
                # Worker 1 waits for the service as long, before it gives up.
                "wait_less": 25.0,
            },
            "statuses": {"worker 0": status("step", number), "worker 1": 1},
        }
        wanted[f"{name}_alone"] = {
            "workers": 2,
            "ps": 1,
            "start": ["worker 1"],
            "arguments": {"signal": int(number), "connect": True, "parts": []},
            "statuses": {"worker 1": status("connect", number)},
        }
    with Jobs("interrupts.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module", params=SIGNALS)
def job(request: pytest.FixtureRequest, jobs: Jobs) -> JobResult:
    return jobs[request.param]


@pytest.mark.parametrize("state", STATES)
def test_a_worker_ends_soon(state: str, job: JobResult) -> None:
    assert job.results[0]["seconds"][state] < SOON


def test_workers_end_within_five_seconds(job: JobResult) -> None:
    # Most of them, since one may be stalled.
    assert statistics.median(job.results[0]["seconds"].values()) < 5


@pytest.mark.parametrize("state", STATES)
def test_it_says_nothing_but_what_python_says(
    state: str, job: JobResult, request: pytest.FixtureRequest
) -> None:
    log = job.logs[f"worker {VICTIMS[state]}"]
    if "terminated" in request.node.callspec.params["job"] or state in ("native", "stay"):
        assert "Traceback" not in log and "Error" not in log
    else:
        assert log.splitlines()[-1] == "KeyboardInterrupt"
        assert log.count("Traceback") == 1
        assert "Error" not in log.replace("OpError", "") or "tensorflow" not in log


def test_the_others_go_on_and_end_alike(job: JobResult) -> None:
    assert sorted(job.results) == [0, 1]
    job.common("weights_sha256")
    # Four runs for each fit, and for the custom loop.
    assert job.common("rounds") == 4 * 6


def test_sigterm_is_a_goodbye(jobs: Jobs) -> None:
    log = jobs["terminated"].logs["ps 0"]
    for state, victim in VICTIMS.items():
        reason = "finished" if state == "stay" else "preempted"
        assert f"worker {victim} left after" in log
        assert log.split(f"worker {victim} left after")[1].splitlines()[0].endswith(reason)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_worker_that_finds_no_service_ends(jobs: Jobs, name: str) -> None:
    job = jobs[f"{name}_alone"]
    assert _seconds(job, 1) < SOON
    assert ("Traceback" in job.logs["worker 1"]) == (name == "interrupted")


@pytest.mark.parametrize("name", SIGNALS)
def test_the_service_of_worker_0_ends_with_it(jobs: Jobs, name: str) -> None:
    """The harness fails the test if any process is left."""
    job = jobs[f"{name}_chief"]
    assert _seconds(job, 0) < SOON
    assert "lives and dies with worker 0" in job.logs["worker 1"].splitlines()[-1]
    assert not [name for name in os.listdir("/dev/shm") if "syncdist" in name]


def _seconds(job: JobResult, victim: int) -> float:
    """Returns how long a worker took to end."""
    return float((job.directory / f"signal-{victim}.json").read_text())


def test_workers_with_ways_of_their_own_are_left_to_them(tmp_path: Path) -> None:
    """One makes the strategy in a thread, one has a handler for SIGTERM and goes on."""
    statuses = {"worker 1": -signal.SIGTERM}
    job = run_job("own_handlers.py", tmp_path, workers=3, ps=1, statuses=statuses)
    assert sorted(job.results) == [0, 2]
    assert job.common("rounds") == 8
    job.common("weights_sha256")
    assert job.results[2]["seen"] == [signal.SIGTERM]
    assert "worker 1 is gone" in job.logs["ps 0"]
