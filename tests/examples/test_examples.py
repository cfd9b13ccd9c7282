"""The example trainers, as a new user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(260)

EXAMPLES = Path(__file__).parents[2] / "examples"
MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist10k"
KEYS = {
    *("worker", "num_workers", "rounds", "contributed", "late", "replayed", "wall_seconds"),
    *("weights_sha256", "optimizer_sha256", "metrics"),
}


def _launch(directory: Path, num_workers: int, script: str, *flags: str) -> list[dict[str, Any]]:
    """Runs an example with the launcher and returns what the workers wrote."""
    command = [sys.executable, "-m", "tf_syncdist.launch", f"--num_workers={num_workers}"]
    command += [str(EXAMPLES / script), f"--summary_dir={directory}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (directory / "output.txt").write_text(done.stdout + done.stderr)
    lines = re.findall(r"worker (\d): weights_sha256=([0-9a-f]{64})$", done.stdout, re.M)
    assert len(lines) == num_workers
    assert not re.search("warning", done.stdout + done.stderr, re.I)
    found = [json.loads((directory / f"worker-{i}.json").read_text()) for i in range(num_workers)]
    for index, summary in enumerate(found):
        assert summary.keys() == KEYS
        assert summary["worker"] == index and summary["num_workers"] == num_workers
        assert dict(lines)[str(index)] == summary["weights_sha256"]
    return found


def _had_a_stall(directory: Path) -> bool:
    """Returns whether rounds went on without a worker that had had no turn for seconds."""
    return "is silent;" in (directory / "output.txt").read_text()


def _run(directory: Path, num_workers: int, script: str, *flags: str) -> list[dict[str, Any]]:
    """As `_launch`, with a strategy that keeps workers in step."""
    found = _launch(directory, num_workers, script, *flags)
    for summary in found:
        in_all = summary["contributed"] + summary["late"] + summary["replayed"]
        assert summary["rounds"] == in_all == found[0]["rounds"] > 0
        for name in ("weights_sha256", "optimizer_sha256", "metrics"):
            assert summary[name] == found[0][name]
        assert all(isinstance(value, float) for value in summary["metrics"].values())
    return found


@pytest.mark.parametrize("what", ["slow_worker", "slow_input"])
def test_a_slow_worker_costs_the_others_little(tmp_path: Path, what: str) -> None:
    flags = ("--backup_workers=1", f"--{what}=2:0.3", "--epochs=6")
    first, second, slow = _run(tmp_path, 3, "train_mnist.py", *flags)
    assert first["metrics"]["test_accuracy"] > 0.9
    # Rounds that are closed without the slow one have not waited for it, and it takes part in few
    # others unless the machine is so busy that 0.3 s are little.
    assert slow["late"] + slow["replayed"] > slow["rounds"] / 4
    assert min(fast["contributed"] for fast in (first, second)) > slow["contributed"]


def test_a_custom_loop_trains_on_two_workers(tmp_path: Path) -> None:
    first, _ = _run(tmp_path, 2, "custom_loop.py", "--epochs=6")
    assert first["metrics"]["test_accuracy"] > 0.93
    assert first["contributed"] == first["rounds"] or _had_a_stall(tmp_path)


def test_one_worker_writes_the_same_summary(tmp_path: Path) -> None:
    (only,) = _run(tmp_path, 1, "train_mnist.py", "--epochs=2", "--steps_per_epoch=10")
    assert only["rounds"] == only["contributed"] == 20
    assert only["wall_seconds"] > 0


def test_mnist_is_learned_by_two_workers(tmp_path: Path) -> None:
    if not MNIST.is_dir():
        pytest.skip("needs the 10,000 MNIST images beside the checkout")
    flags = (f"--data_dir={MNIST}", "--model=cnn", "--epochs=3")
    first, _ = _run(tmp_path, 2, "train_mnist.py", *flags)
    assert first["metrics"]["test_accuracy"] > 0.95


@pytest.mark.parametrize(
    "strategy",
    [
        "model_averaging",
        "model_averaging --learners_per_device=auto",
        "elastic_averaging",
        "gossip",
        "async",
    ],
)
def test_every_other_strategy_learns_with_default_flags(tmp_path: Path, strategy: str) -> None:
    flags, least = ["--epochs=4"], 0.8
    if MNIST.is_dir():
        flags, least = [f"--data_dir={MNIST}", "--model=cnn", "--epochs=1"], 0.93
    found = _launch(tmp_path, 2, "train_mnist.py", *f"--strategy={strategy}".split(), *flags)
    for summary in found:
        assert summary["metrics"]["test_accuracy"] > least
        assert summary["rounds"] > 0
        assert summary["contributed"] == summary["rounds"] or _had_a_stall(tmp_path)
