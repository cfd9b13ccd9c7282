"""Measures how long the first step of a new model takes, most of which is tracing.

    python -m benchmarks.tracing --json_out=tracing.json

Each system is two processes at a time, so that all of them have the same share of two cores. The
systems alternate; a row is the median over all models of all processes.
"""

from __future__ import annotations

import json
import pathlib
import statistics

from absl import app, flags

from benchmarks import processes

_MODELS = flags.DEFINE_integer("models", 8, "Models of a process.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "How often each system is run.", lower_bound=1)
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 120, "Deadline of one run.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows, if given.")


def main(argv: list[str]) -> None:
    """Runs the systems in turn and prints the medians."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    seconds: dict[str, list[float]] = {"mirrored": [], "ours": []}
    for _ in range(_REPEATS.value):
        for system, found in seconds.items():
            worker_flags = [[f"--system={system}", f"--models={_MODELS.value}"]] * 2
            outcomes = processes.run_cluster(
                "benchmarks.tracing_worker", worker_flags, _TIMEOUT_SECONDS.value
            )
            found += [s for outcome in outcomes for s in outcome.result["seconds"]]
    rows = [
        {"system": system, "workers": 2, "median_seconds": statistics.median(found)}
        for system, found in seconds.items()
    ]
    for row in rows:
        ratio = row["median_seconds"] / rows[0]["median_seconds"]
        print(f"{row['system']:10} {row['median_seconds']:.3f} s  {ratio:.2f} of MirroredStrategy")
    if _JSON_OUT.value:
        pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
