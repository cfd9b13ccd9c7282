"""`propagation="auto"` chooses by what it measures, and a timeline shows what became of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

STEPS = 24
# 4 MB take 80 ms, about as long as the forward pass and as the backward pass.
THIN = {"limit_gbps": 0.4, "transport": "grpc"}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Iterator[Jobs]:
    def job(name: str, more: dict[str, Any], **strategy: Any) -> dict[str, Any]:
        strategy["timeline"] = str(traces / f"{name}-{len(more)}.json")
        given = {"propagation": {"name": name, **more}, "strategy": strategy, "steps": STEPS}
        return {"workers": 2, "arguments": given}

    wanted = {
        "fifo": job("fifo", {}),
        "thin": job("auto", {}, **THIN),
        # So many slices would cost more than any network.
        "many": job("auto", {"slice_elements": 500}, transport="grpc"),
        "priority": job("priority", {}, **THIN),
    }
    with Jobs("auto_propagation.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.mark.parametrize("name, choice", [("thin", "by priority"), ("many", "in the order")])
def test_it_says_once_what_it_has_chosen_and_why(name: str, choice: str, jobs: Jobs) -> None:
    job: JobResult = jobs[name]
    for worker, log in job.logs.items():
        lines = [line for line in log.splitlines() if "gradients travel" in line]
        assert len(lines) == (worker == "worker 0")
        for line in lines:
            assert f"gradients travel {choice}" in line and "s per round" in line


@pytest.mark.parametrize("name", ["thin", "many", "priority"])
def test_all_end_with_the_same_bits(name: str, jobs: Jobs) -> None:
    expected = jobs["fifo"].common("weights_sha256")
    assert jobs[name].common("weights_sha256") == expected


def _events(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault(event["cat"], []).append(event)
    return found


@pytest.mark.parametrize("worker", [0, 1])
def test_a_timeline_shows_what_each_slice_did(worker: int, jobs: Jobs, traces: Path) -> None:
    jobs["priority"].common("weights_sha256")
    events = _events(traces / f"priority-0.worker-{worker}.json")
    slices = 4 * 250_000 // 50_000
    assert len(events["compute"]) == STEPS
    for category in ("push", "sum", "pull"):
        assert len(events[category]) == STEPS * slices
        by_run = [e["args"]["run"] for e in events[category]]
        assert sorted(set(by_run)) == list(range(STEPS))
    assert sum(e["args"]["bytes"] for e in events["push"]) == STEPS * 4_000_000
    assert {e["args"]["priority"] for e in events["pull"]} == {0, 1, 2, 3}
    # Updates are made layer by layer, the first layer's first.
    updates = [e["args"]["priority"] for e in events["apply"] if e["args"]["run"] == 5]
    assert updates == [0, 1, 2, 3]
    # They overlap with the computing of the run that follows.
    last = [e for e in events["apply"] if e["args"]["run"] == 5][-1]
    (after,) = [e for e in events["compute"] if e["args"]["run"] == 6]
    assert after["ts"] < last["ts"] < after["ts"] + after["dur"]


def test_in_the_order_of_backpropagation_the_last_layer_leaves_first(
    jobs: Jobs, traces: Path
) -> None:
    jobs["fifo"].common("weights_sha256")
    events = _events(traces / "fifo-0.worker-0.json")
    assert len(events["compute"]) == len(events["apply"]) == STEPS
    for apply, compute in zip(events["apply"], events["compute"], strict=True):
        assert apply["ts"] >= compute["ts"] + compute["dur"] - 1
