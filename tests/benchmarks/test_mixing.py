"""benchmarks.mixing: its rows, what they are medians of, and how they compare."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]


def _load(name: str) -> ModuleType:
    """Loads a file by itself: with the checkout on the path, `tf_syncdist` would mean that one."""
    spec = importlib.util.spec_from_file_location(name, _ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rows = _load("mixing_rows")
control = _load("mixing_control")


def _seed(seconds: float | None, rate: float = 100.0) -> dict[str, Any]:
    return {
        "seconds_to_target": seconds,
        "epochs_to_target": seconds,
        "steps_per_second": rate,
        "examples_per_second": 16 * rate,
        "final_accuracy": 0.97,
    }


def _row(strategy: str, learners: int, seconds: float, **more: Any) -> dict[str, Any]:
    row = {"part": "learners", "strategy": strategy, "workers": 1, "learners": learners}
    row |= {"auto": False, "devices": 1, "batch_size": 16, "straggler": False}
    return {**row, **rows.medians([_seed(seconds)]), **more}


def test_a_run_that_misses_the_target_counts_as_endless() -> None:
    found = rows.medians([_seed(2.0), _seed(None), _seed(4.0)])
    assert found["seconds_to_target"] == 4.0 and found["reached"] == 2
    assert rows.medians([_seed(2.0), _seed(None), _seed(None)])["seconds_to_target"] is None
    assert len(found["runs"]) == 3


def test_learners_are_compared_with_one_and_with_batches_as_large() -> None:
    measured = [
        _row("model_averaging", 1, 8.0),
        _row("model_averaging", 2, 4.0),
        _row("model_averaging", 2, 5.0, auto=True),
        _row("mirrored", 2, 10.0, devices=2, batch_size=32),
        _row("mirrored", 4, 1.0, devices=4, batch_size=64),
    ]
    text = "\n".join(rows.comparisons(measured))
    assert "2 learners to one learner: 0.50 of the time, 0.50 of the epochs" in text
    assert "2 learners to MirroredStrategy on 2 devices: 0.40 of the time" in text
    assert "2 learners (auto) to one learner: 0.62 of the time" in text
    assert "4 devices" not in text
    head, *lines = rows.table(measured).splitlines()
    assert head.split()[0] == "strategy" and len(lines) == len(measured)
    assert "auto (2)" in lines[2] and lines[0].endswith("1/1")


def test_what_is_left_of_the_rate_beside_a_slow_worker_is_said() -> None:
    slow = _row("async", 4, 3.0, part="stragglers", workers=4, straggler=True, rate_ratio=0.94)
    (line,) = rows.comparisons([slow])
    assert line.startswith("async with one of 4 workers slow") and "keep 94 %" in line


def test_workers_that_wait_for_one_another_see_the_same_numbers(tmp_path: Path) -> None:
    control.create(tmp_path / "control", 2)
    one, other = (control.Control(tmp_path / "control", i, 2, 0.0) for i in range(2))
    assert one.last_step == control.FOREVER and not one.is_paused
    one.note_steps(3)
    other.note_steps(4)
    assert one.steps_of_all == other.steps_of_all == 7
    with one.pause():
        assert other.is_paused
        with pytest.raises(TimeoutError, match="a test to end"):
            other.wait_for_test()
    other.wait_for_test()
    one.last_step = 9
    assert other.last_step == 9
    with pytest.raises(TimeoutError, match="all workers"):
        one.meet()
    other.meet()


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.mixing", *flags],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_rows_of_learners_and_of_jobs_with_a_slow_worker(tmp_path: Path) -> None:
    done = _run("--quick", "--most_seconds=200", f"--json_out={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    assert "steps/s" in done.stdout
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["part"], r["strategy"], r["learners"], r["devices"]) for r in found] == [
        ("learners", "model_averaging", 2, 1),
        ("learners", "mirrored", 2, 2),
        ("learners", "mirrored", 2, 1),
        ("strategies", "elastic_averaging", 2, 1),
        ("strategies", "gossip:pull", 2, 1),
        ("stragglers", "elastic_averaging", 2, 1),
        ("stragglers", "gossip:pull", 2, 1),
    ]
    for row in found:
        (run,) = row["runs"]
        assert row["straggler"] == (row["part"] == "stragglers")
        assert row["steps_per_second"] > 0 and 0 < row["final_accuracy"] < 1
        assert row["batch_size"] == (32 if row["strategy"] == "mirrored" else 16)
        assert run["final_accuracy"] == run["curve"][-1][2] == row["final_accuracy"]
        seconds, epochs, _ = zip(*run["curve"], strict=True)
        assert list(seconds) == sorted(seconds) and list(epochs) == sorted(epochs)
        assert (run["seconds_to_target"] is None) == (row["reached"] == 0)
        if row["straggler"]:
            fast, slow = run["worker_rates"]
            assert slow < 1 / run["delay_seconds"]
            assert math.isclose(fast, row["steps_per_second"])
    slowed = [row for row in found if row["straggler"]]
    before = [row for row in found if row["part"] == "strategies"]
    for row, undelayed in zip(slowed, before, strict=True):
        (run,) = row["runs"]
        assert math.isclose(run["delay_seconds"], 9 / undelayed["steps_per_second"])
        ratio = row["steps_per_second"] / undelayed["steps_per_second"]
        assert math.isclose(row["rate_ratio"], ratio)
    # A worker that the machine holds up within one of the jobs, for a second or so, is no faster.
    assert any(
        slow < fast / 3 and 0.3 < row["rate_ratio"] < 3
        for row in slowed
        for fast, slow in [row["runs"][0]["worker_rates"]]
    )


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--parts=gossip", "--parts"),
        ("--strategies=sgd", "--strategies"),
        ("--learners=0", "from 1"),
    ],
)
def test_mistakes_end_with_a_message(flag: str, text: str) -> None:
    done = _run(flag)
    assert done.returncode == 1
    assert text in done.stdout + done.stderr and "Received: [" in done.stdout + done.stderr
