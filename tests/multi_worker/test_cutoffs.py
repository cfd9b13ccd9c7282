"""Keras' fit with cutoffs that change from round to round, on real processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tf_syncdist.cutoff import traces

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(280)

WORKERS = 3
SLOW = 2
ROUNDS = 60

DEADLINE = {"policy": "Deadline", "config": {"seconds": 0.1, "min_fraction": 0.3}}
ORDER = {"policy": "OrderStatistics", "config": {"window": 5}}
LEARNED = {"policy": "LearnedCutoff", "config": {"warmup_rounds": 100}}
CHOICES = {"deadline": DEADLINE, "order_statistics": ORDER}


def job_of(ps: int, seconds: tuple[float, float], epochs: int, **policy: Any) -> dict[str, Any]:
    """Returns what a job is run with, in which steps take some time or, now and then, longer."""
    arguments = {"slow": SLOW, "seconds": seconds, "epochs": epochs, **policy}
    return {"workers": WORKERS, "ps": ps, "ps_runs_program": True, "arguments": arguments}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    todo = {
        "deadline": job_of(0, (0.05, 0.4), 2, **DEADLINE),
        "order_statistics": job_of(2, (0.05, 0.4), 2, **ORDER),
        "learned": job_of(0, (0.02, 0.08), 5, **LEARNED),
    }
    with Jobs("cutoffs.py", tmp_path_factory, todo) as running:
        yield running


@pytest.fixture(params=CHOICES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def job(jobs: Jobs, name: str) -> JobResult:
    return jobs[name]


def test_workers_end_with_the_same_bits_and_metrics(job: JobResult) -> None:
    job.common("weights_sha256")
    job.common("optimizer_sha256")
    assert len(job.common("history")["loss"]) == 2
    assert job.common("replicas") == WORKERS


def test_slow_steps_are_not_waited_for_and_usual_ones_are(job: JobResult) -> None:
    slow = job.results[SLOW]["local"]
    assert slow["rounds"] == ROUNDS
    assert slow["late"] + slow["replayed"] >= 8
    assert slow["contributed"] >= 8


def test_the_report_says_what_was_chosen(job: JobResult, name: str) -> None:
    told = job.common("cutoff")
    assert told["policy"].startswith(CHOICES[name]["policy"]) and told["rounds"] == ROUNDS
    assert told["least"] < told["most"] == WORKERS
    assert 0.04 < told["closed_seconds"] < 0.4
    assert not told["failure"]
    line = f"closed the last {ROUNDS} rounds with {told['least']} to 3 of 3 contributions"
    assert line in job.common("report_text") and line in job.logs["worker 0"]
    if name == "order_statistics":
        assert 0.04 < told["expected_seconds"] < 0.4
        assert "s were expected; best of the last 5 round(s)" in job.common("report_text")


def test_the_trace_tells_how_long_workers_took(job: JobResult) -> None:
    path = Path(job.common("directory")) / "trace.npz"
    trace = traces.load(path, num_workers=WORKERS)
    # The first round may have begun before the first shard could know when.
    assert ROUNDS - 1 <= trace.num_rounds <= ROUNDS
    assert trace.present.all()
    usual = trace.seconds[:, [w for w in range(WORKERS) if w != SLOW]]
    assert np.nanmin(usual) >= 0.04
    assert np.isnan(trace.seconds[:, SLOW]).sum() >= 8


def test_all_are_waited_for_while_run_times_are_learned(jobs: Jobs) -> None:
    """The job ends while a model is being trained; the harness sees that this ends, too."""
    job = jobs["learned"]
    job.common("weights_sha256")
    told = job.common("cutoff")
    assert told["policy"].startswith("LearnedCutoff") and not told["failure"]
    assert told["reason"].startswith(("everybody is waited for", "predicted by the smoother"))
    slow = job.results[SLOW]["local"]
    assert slow["rounds"] == 150 and slow["contributed"] >= 100
    trace = traces.load(Path(job.common("directory")) / "trace.npz", num_workers=WORKERS)
    assert not np.isnan(trace.seconds[1:100]).any()
