"""However gradients travel, training ends alike."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

ROUNDS = 24
EXACT = ("shared_memory", "grpc", "one_bucket", "shards")
NARROW = {"float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    together = {"workers": 2}
    slow = {"workers": 3, "arguments": {"pause_seconds": 0.02}}
    given: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "shared_memory": (together, {"transport": "shared_memory"}),
        "grpc": (together, {"transport": "grpc"}),
        "one_bucket": (together, {"bucket_bytes": 2**20}),
        "shards": ({"workers": 2, "ps": 2}, {}),
        "float16": (together, {"compression": "float16"}),
        "bfloat16": (together, {"compression": "bfloat16", "transport": "grpc"}),
        "in_order": ({"workers": 3}, {"deterministic": True}),
        "in_order_again": ({"workers": 3}, {"deterministic": True, "transport": "grpc"}),
        "overlap": ({"workers": 2, "arguments": {"gradient_seconds": 0.2}}, {}),
        "backup": (slow, {"backup_workers": 1, "compression": "bfloat16"}),
    }
    wanted = {
        name: job | {"arguments": job.get("arguments", {}) | {"strategy": strategy}}
        for name, (job, strategy) in given.items()
    }
    wanted["plain"] = {"workers": 0, "arguments": {"plain": True}}
    with Jobs("data_plane.py", tmp_path_factory, wanted) as started:
        yield started


def _check(job: JobResult, plain: JobResult, tolerance: float) -> None:
    job.common("weights_sha256")
    expected = plain.results[0]
    for name in ("weights", "embedding", "loss"):
        for a, b in zip(job.common(name), expected[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    # Words that no example has keep their vectors, bit for bit.
    assert job.common("untouched") == expected["untouched"]


@pytest.mark.parametrize("name", EXACT)
def test_two_workers_end_as_one_process(name: str, jobs: Jobs) -> None:
    _check(jobs[name], jobs["plain"], 1e-5)
    for log in jobs[name].logs.values():
        assert "shares no memory" not in log


@pytest.mark.parametrize("name", NARROW)
def test_compressed_gradients_end_nearly_there(name: str, jobs: Jobs) -> None:
    _check(jobs[name], jobs["plain"], NARROW[name])
    assert jobs[name].common("weights_sha256") != jobs["grpc"].common("weights_sha256")


def test_deterministic_jobs_end_with_the_same_bits(jobs: Jobs) -> None:
    first, second = jobs["in_order"], jobs["in_order_again"]
    assert first.common("weights_sha256") == second.common("weights_sha256")
    _check(first, jobs["plain"], 1e-4)


def test_compressed_gradients_with_backup_workers_leave_all_with_the_same_bits(jobs: Jobs) -> None:
    job = jobs["backup"]
    job.common("weights_sha256")
    assert sum(local["contributed"] for local in job.each("local")) <= 2 * ROUNDS
    assert all(local["rounds"] == ROUNDS for local in job.each("local"))


def test_gradients_leave_while_others_are_computed(jobs: Jobs) -> None:
    """The embedding's gradient is the last one; those of the layers behind it do not wait."""
    for events in jobs["overlap"].each("events"):
        steps = " ".join(events).split("gradient")
        assert len(steps) == ROUNDS + 1
        # Between two slow gradients the embedding sends, and then the last layers in the next step.
        early = [step.split().count("send") >= 3 for step in steps[1:-1]]
        # The machine may be so busy that now and then nothing is sent in the meantime.
        assert sum(early) > 0.8 * len(early)
