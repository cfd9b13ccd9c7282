"""The part of benchmarks.mixing about learners on one device, against MirroredStrategy."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import mixing_rows
from benchmarks.mixing_settings import Settings

Run = dict[str, Any]
# Starts processes for a request, and returns what each of them returned.
Start = Callable[[dict[str, Any]], list[Run]]


@dataclasses.dataclass(frozen=True)
class System:
    """What is measured.

    Args:
        strategy: "model_averaging" or "mirrored".
        learners: Learners of the device, or "auto"; for the peer, how many times as large its batch
            is as that of a learner.
        devices: Logical CPU devices.
    """

    strategy: str
    learners: str
    devices: int = 1

    def __str__(self) -> str:
        return f"{self.strategy}, {self.learners} learner(s), {self.devices} device(s)"


def measure(
    start: Start, learners: Sequence[str], seeds: int, settings: Settings
) -> list[mixing_rows.Row]:
    """Trains with all systems in turn, once for each seed, and returns their rows.

    Args:
        start: Starts processes.
        learners: How many learners to give a device; "auto" among them, perhaps.
        seeds: How many seeds.
        settings: How to train.
    """
    systems = _systems(learners)
    runs: dict[System, list[Run]] = {}
    for seed in range(seeds):
        # What "auto" comes to may call for another peer, at the end.
        for system in systems:
            task = {**dataclasses.asdict(system), "seed": seed}
            (run,) = start({"learners": task, "settings": settings._asdict()})
            print(f"{system}, seed {seed}: {mixing_rows.line(run)}", file=sys.stderr, flush=True)
            runs.setdefault(system, []).append(run)
            if system.learners == "auto":
                found = _peers(str(run["learners"]))
                systems += [peer for peer in found if peer not in systems]
    return [_row(system, runs[system], settings) for system in systems]


def _systems(learners: Sequence[str]) -> list[System]:
    ours = [System("model_averaging", number) for number in learners]
    # The same number may be asked for twice.
    return list(dict.fromkeys([*ours, *(peer for k in learners for peer in _peers(k))]))


def _peers(learners: str) -> list[System]:
    """Returns MirroredStrategy with a batch as large as all learners' together.

    Once on a device for each of them, and once on the very device that learners have. One learner
    is plain Keras, which needs no peer.
    """
    if learners in ("auto", "1"):
        return []
    return [System("mirrored", learners, int(learners)), System("mirrored", learners)]


def _row(system: System, runs: Sequence[Run], settings: Settings) -> mixing_rows.Row:
    learners = statistics.median_low(run["learners"] for run in runs)
    is_mirrored = system.strategy == "mirrored"
    return {
        "part": "learners",
        "strategy": system.strategy,
        "workers": 1,
        "learners": learners,
        "auto": system.learners == "auto",
        "devices": system.devices,
        "op_threads": settings.op_threads,
        "central_momentum": None if is_mirrored else settings.central_momentum,
        "batch_size": settings.batch_size * (learners if is_mirrored else 1),
        "straggler": False,
        **mixing_rows.medians(runs),
    }
