"""The part of benchmarks.mixing about learners on one device, against MirroredStrategy."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import mixing_rows
from benchmarks.turns import TurnProcess


@dataclasses.dataclass(frozen=True)
class System:
    """What is measured.

    Args:
        strategy: "model_averaging" or "mirrored".
        learners: Learners on the device, or "auto"; for the peer how many times as large its batch
            is as that of a learner.
        devices: Logical CPU devices.
    """

    strategy: str
    learners: str
    devices: int = 1

    def flags(self, batch_size: int) -> list[str]:
        """Returns what its process is told, given the batch size of a learner."""
        if self.strategy == "mirrored":
            batch = int(self.learners) * batch_size
            return ["--system=mirrored", f"--devices={self.devices}", f"--batch_size={batch}"]
        return [f"--learners={self.learners}", f"--batch_size={batch_size}"]

    def __str__(self) -> str:
        return f"{self.strategy}-{self.learners}-on-{self.devices}"


def systems(learners: Sequence[str]) -> list[System]:
    """Returns what to measure, "auto" first since it may call for more peers."""
    numbers = [System("model_averaging", k) for k in sorted(learners, key=_order)]
    return numbers + [peer for k in learners if k not in ("auto", "1") for peer in peers(k)]


def peers(learners: str) -> list[System]:
    """Returns MirroredStrategy with a batch as large as all learners' together.

    Once with a device for each of them, and once with the very device that learners have.
    """
    return [System("mirrored", learners, int(learners)), System("mirrored", learners, 1)]


def measure(
    learners: Sequence[str],
    seeds: int,
    batch_size: int,
    flags: Sequence[str],
    timeout_seconds: float,
) -> list[mixing_rows.Row]:
    """Trains with all systems in turn, once for each seed, and returns their rows.

    Args:
        learners: How many learners to give a device; "auto" among them, perhaps.
        seeds: How many seeds.
        batch_size: That of a learner.
        flags: What every process is told besides.
        timeout_seconds: When the processes give up.
    """
    found = systems(learners)
    runs: dict[System, list[dict[str, Any]]] = {}
    processes: dict[System, TurnProcess] = {}
    give_up_at = time.time() + timeout_seconds
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:

        def start(system: System) -> None:
            processes[system] = TurnProcess(
                str(system),
                "benchmarks.mixing_learner_worker",
                [*system.flags(batch_size), *flags],
                pathlib.Path(name),
                give_up_at,
            )

        try:
            for system in found:
                start(system)
            for process in processes.values():
                process.ask("ready")
            for seed in range(seeds):
                queue = list(found)
                while queue:
                    system = queue.pop(0)
                    run = processes[system].ask(str(seed))
                    runs.setdefault(system, []).append(run)
                    print(f"{system}, seed {seed}: {_line(run)}", file=sys.stderr, flush=True)
                    if system.learners != "auto" or run["learners"] == 1:
                        continue
                    for peer in peers(str(run["learners"])):
                        if peer not in found:
                            found.append(peer)
                            queue.append(peer)
                            start(peer)
                            processes[peer].ask("ready")
        finally:
            for process in processes.values():
                process.kill()
    return [_row(system, runs[system], batch_size) for system in found]


def _row(system: System, runs: Sequence[dict[str, Any]], batch_size: int) -> mixing_rows.Row:
    learners = statistics.median_low(run["learners"] for run in runs)
    is_peer = system.strategy == "mirrored"
    return {
        "part": "learners",
        "strategy": system.strategy,
        "learners": int(system.learners) if is_peer else learners,
        "auto": system.learners == "auto",
        "devices": system.devices,
        "workers": 1,
        "batch_size": int(system.learners) * batch_size if is_peer else batch_size,
        "straggler": False,
        **mixing_rows.medians(runs),
    }


def _order(learners: str) -> int:
    return 0 if learners == "auto" else int(learners)


def _line(run: dict[str, Any]) -> str:
    seconds = run["seconds_to_target"]
    reached = "target not reached" if seconds is None else f"{seconds:.2f} s to the target"
    return f"{reached}, {run['steps_per_second']:.1f} steps/s, {run['learners']} learners"
