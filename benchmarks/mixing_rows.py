"""The rows of benchmarks.mixing: medians over seeds, their table, and how they compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

# Of each of them a row has the median over its runs.
_NUMBERS = (
    "seconds_to_target",
    "epochs_to_target",
    "steps_per_second",
    "examples_per_second",
    "final_accuracy",
)
_COLUMNS = {
    "strategy": "strategy",
    "workers": "workers",
    "learners": "learners",
    "devices": "devices",
    "batch_size": "batch",
    "straggler": "straggler",
    "seconds_to_target": "s to target",
    "epochs_to_target": "epochs to it",
    "steps_per_second": "steps/s",
    "examples_per_second": "images/s",
    "final_accuracy": "accuracy",
    "reached": "reached",
}


def medians(runs: Sequence[dict[str, Any]]) -> Row:
    """Returns the medians over runs with different seeds, and the runs.

    A run that has not reached the target took forever; if half of them have not, so has the median.
    """
    found: Row = {}
    for name in _NUMBERS:
        median = statistics.median(math.inf if r[name] is None else r[name] for r in runs)
        found[name] = median if math.isfinite(median) else None
    found["reached"] = sum(run["seconds_to_target"] is not None for run in runs)
    return {**found, "runs": list(runs)}


def table(rows: Iterable[Row]) -> str:
    """Returns rows as aligned text."""
    lines = [list(_COLUMNS.values())]
    lines += [[_cell(name, row) for name in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def line(run: dict[str, Any]) -> str:
    """Returns a run in short."""
    seconds, learners = run["seconds_to_target"], run.get("learners")
    reached = "target not reached" if seconds is None else f"{seconds:.2f} s to the target"
    of = f", {learners} learner(s)" if learners else ""
    return f"{reached}, {run['steps_per_second']:.1f} steps/s{of}"


def comparisons(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for each pair of rows that is worth comparing."""
    found = _of_learners([row for row in rows if row["part"] == "learners"])
    return found + [
        f"{row['strategy']} with one of {row['workers']} workers slow: the others keep "
        f"{100 * row['rate_ratio']:.0f} % of their steps per second"
        for row in rows
        if row["part"] == "stragglers"
    ]


def _of_learners(rows: Sequence[Row]) -> list[str]:
    ours = [row for row in rows if row["strategy"] == "model_averaging"]
    others = [row for row in rows if row["strategy"] == "mirrored"]
    alone = [row for row in ours if row["learners"] == 1 and not row["auto"]]
    found = []
    for row in ours:
        if row in alone:
            continue
        name = f"{row['learners']} learners" + (" (auto)" if row["auto"] else "")
        found += [_compared(name, row, "one learner", other) for other in alone]
        found += [
            _compared(name, row, f"MirroredStrategy on {_devices(other)}", other)
            for other in others
            if other["learners"] == row["learners"]
        ]
    return found


def _devices(row: Row) -> str:
    return "one device" if row["devices"] == 1 else f"{row['devices']} devices"


def _compared(name: str, row: Row, other_name: str, other: Row) -> str:
    seconds, epochs = (
        _ratio(row[key], other[key]) for key in ("seconds_to_target", "epochs_to_target")
    )
    return f"{name} to {other_name}: {seconds} of the time, {epochs} of the epochs to the target"


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value is not None and other else "unknown"


def _cell(name: str, row: Row) -> str:
    value = row.get(name)
    if name == "reached":
        return f"{value}/{len(row['runs'])}"
    if name == "learners" and row.get("auto"):
        return f"auto ({value})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if name == "final_accuracy":
        return f"{value:.3f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
