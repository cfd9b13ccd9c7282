"""The rows of benchmarks.propagation: what they say about each other, and as a table. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MODES = ["no_overlap", "fifo", "sliced", "priority"]

_COLUMNS = {
    "model": "model",
    "mode": "mode",
    "slice_elements": "slice",
    "gbps": "Gb/s",
    "link_gbps": "link Gb/s",
    "ratio": "ratio",
    "compute_seconds": "compute s",
    "exchange_seconds": "exchange s",
    "step_seconds": "step s",
    "speedup_over_fifo": "over fifo",
    "speedup_over_no_overlap": "over no_overlap",
    "bound": "bound",
    "cpu_seconds": "cpu s",
}

Row = dict[str, Any]


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with their speed-ups over modes fifo and no_overlap.

    Args:
        rows: The rows. Those of one model have the same bandwidths in all modes.

    Returns:
        Rows with `speedup_over_fifo` and `speedup_over_no_overlap`, which are 1.25 where a step
        takes four fifths of the other's time, and `None` where the other mode was not measured.
    """
    seconds = {(row["model"], row["gbps"], row["mode"]): row["step_seconds"] for row in rows}
    found = []
    for row in rows:
        row = dict(row)
        for mode in ("fifo", "no_overlap"):
            other = seconds.get((row["model"], row["gbps"], mode))
            row[f"speedup_over_{mode}"] = other / row["step_seconds"] if other else None
        found.append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as aligned text."""
    lines = [list(_COLUMNS.values())]
    lines += [[_cell(column, row.get(column)) for column in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "gbps" and not value:
        return "no limit"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
