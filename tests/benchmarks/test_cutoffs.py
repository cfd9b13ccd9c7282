"""benchmarks.cutoffs: its rows, and what is the best in hindsight."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tf_syncdist.cutoff import Deadline, FullSync, OrderStatistics
from tf_syncdist.simulation import laws
from tf_syncdist.simulation.jobs import simulate

_ROOT = Path(__file__).parents[2]


def _load(name: str) -> ModuleType:
    """Loads a file by itself: with the checkout on the path, `tf_syncdist` would mean that one."""
    spec = importlib.util.spec_from_file_location(name, _ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


policies = _load("cutoff_policies")


def test_the_best_deadline_is_the_best_of_those_that_are_tried() -> None:
    seconds = laws.RegimeSwitching(2.5).sample(200, 20, np.random.default_rng(0))
    best = policies.best_deadline(seconds)
    most = simulate(seconds, best).throughput
    for factor in (0.5, 0.8, 1.25, 2.0):
        other = Deadline(best.seconds * factor)
        assert simulate(seconds, other).throughput <= most * 1.005


def test_plans_are_timed_and_otherwise_the_same() -> None:
    seconds = laws.LogNormal(0.3).sample(50, 20, np.random.default_rng(0))
    timed = policies.Timed(OrderStatistics())
    outcome = simulate(seconds, timed)
    assert outcome.throughput == simulate(seconds, OrderStatistics()).throughput
    assert 0 < timed.decision_seconds < 0.1
    fixed = policies.Timed(FullSync())
    simulate(seconds, fixed)
    assert fixed.decision_seconds == 0


def _run(tmp_path: Path, *flags: str) -> list[dict]:
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cutoffs", f"--json_out={file}", *flags],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "of oracle" in done.stdout
    return json.loads(file.read_text())


def test_rows_of_all_policies_that_need_no_model(tmp_path: Path) -> None:
    rows = _run(
        tmp_path,
        "--laws=regime_switching,chen2016",
        "--factors=2.5",
        "--num_workers=8",
        "--seeds=0,1",
        "--rounds=200",
        "--policies=full,backup,deadline,elfving,order_statistics,learned:smoother",
    )
    cases = {(row["law"], row["factor"]) for row in rows}
    assert cases == {("regime_switching", 2.5), ("chen2016", None)}
    by_policy = {row["policy"]: row for row in rows if row["law"] == "chen2016"}
    assert set(by_policy) == {
        "full",
        "backup:1",
        "backup:best",
        "deadline:best",
        "elfving",
        "order_statistics",
        "learned:smoother",
    }
    assert by_policy["backup:best"]["static_ratio"] == pytest.approx(1)
    assert by_policy["full"]["oracle_ratio"] < by_policy["backup:best"]["oracle_ratio"] < 1
    for row in rows:
        assert row["workers"] == 8 and row["seeds"] == [0, 1]
        assert row["throughput"] > 0 and 0 < row["oracle_ratio"] < 1.05
        assert (row["decision_seconds"] > 0) == row["policy"].startswith(
            ("elfving", "order_statistics", "learned")
        )


def test_mistakes_end_with_a_message() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cutoffs", "--laws=gamma"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Expected a law of" in done.stdout + done.stderr
