"""Measures what the strategy costs a single worker: steps per second of `model.fit`.

    python -m benchmarks.fit_overhead --json_out=fit_overhead.json

Three processes live as long as the benchmark: without a strategy, under MirroredStrategy with one
device, and under SyncReplicasStrategy as a single worker. They take turns, so that only one
of them computes and a change of the machine's load hits all of them. A turn is a `fit` of two
epochs, of which the second one is timed. A row is the median over all turns.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from benchmarks.turns import TurnProcess

_BLOCKS = flags.DEFINE_integer("blocks", 15, "Turns of each system with a model.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 200, "Timed steps of a turn.", lower_bound=1)
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 900, "Deadline of the whole run.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows, if given.")

_SYSTEMS = ("plain", "mirrored", "ours")
_MODELS = ("mlp", "cnn")


@contextlib.contextmanager
def _processes() -> Iterator[dict[str, TurnProcess]]:
    """Starts one process per system and ends them."""
    give_up_at = time.time() + _TIMEOUT_SECONDS.value
    with tempfile.TemporaryDirectory(prefix="benchmark_") as directory:
        started: dict[str, TurnProcess] = {}
        try:
            for system in _SYSTEMS:
                started[system] = TurnProcess(
                    system,
                    "benchmarks.fit_overhead_worker",
                    [f"--system={system}", f"--steps={_STEPS.value}"],
                    pathlib.Path(directory),
                    give_up_at,
                )
            yield started
        finally:
            for process in started.values():
                process.kill()


def _measure() -> dict[tuple[str, str], list[float]]:
    """Gives all systems their turns and returns the rates by model and system."""
    rates: dict[tuple[str, str], list[float]] = {(m, s): [] for m in _MODELS for s in _SYSTEMS}
    with _processes() as processes:
        # The block before the first one is not kept: it waits for the processes to start.
        for block in range(-1, _BLOCKS.value):
            print(f"block {block} ...", file=sys.stderr, flush=True)
            # Another one begins each time, in case the order matters.
            first = block % len(_SYSTEMS)
            for model in _MODELS:
                for system in (*_SYSTEMS[first:], *_SYSTEMS[:first]):
                    rate = processes[system].ask(model)["steps_per_second"]
                    if block >= 0:
                        rates[model, system].append(rate)
    return rates


def _rows(rates: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Returns a row for each model and system."""
    medians = {key: statistics.median(found) for key, found in rates.items()}
    return [
        {
            "model": model,
            "system": system,
            "steps_per_second": medians[model, system],
            "min_steps_per_second": min(found),
            "max_steps_per_second": max(found),
            "ratio_to_plain": medians[model, system] / medians[model, "plain"],
            "ratio_to_mirrored": medians[model, system] / medians[model, "mirrored"],
            "blocks": len(found),
            "steps": _STEPS.value,
        }
        for (model, system), found in rates.items()
    ]


def main(argv: list[str]) -> None:
    """Measures, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    rows = _rows(_measure())
    print("model  system    steps/s     min     max  of plain  of MirroredStrategy")
    for row in rows:
        print(
            f"{row['model']:5}  {row['system']:8}  {row['steps_per_second']:7.1f} "
            f"{row['min_steps_per_second']:7.1f} {row['max_steps_per_second']:7.1f}  "
            f"{row['ratio_to_plain']:8.2f}  {row['ratio_to_mirrored']:.2f}"
        )
    if _JSON_OUT.value:
        pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
