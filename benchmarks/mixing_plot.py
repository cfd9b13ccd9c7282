"""The figure of benchmarks.mixing: accuracy against the time of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tf_syncdist.simulation.plot import check

__all__ = ["check", "plot"]

_TITLES = {
    "learners": "learners on one device",
    "strategies": "workers",
    "stragglers": "workers, one of them slow",
}


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws a panel for each part, with a line for each row: its run of median time.

    Args:
        rows: Rows of the benchmark.
        path: The file; its suffix tells the format.
    """
    pyplot = check()
    parts = [part for part in _TITLES if any(row["part"] == part for row in rows)]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(6 * len(parts), 4.5), squeeze=False)
    for part, ax in zip(parts, axes[0], strict=True):
        found = [row for row in rows if row["part"] == part]
        for row in found:
            seconds, _, accuracies = zip(*_median_run(row)["curve"], strict=True)
            ax.plot(seconds, accuracies, ".-", label=_label(row), linewidth=1)
        workers = "" if part == "learners" else f"{found[0]['workers']} "
        ax.set(title=workers + _TITLES[part], xlabel="seconds of training", ylabel="test accuracy")
        ax.set_ylim(bottom=0.7, top=1.0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _median_run(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the run with the median time; runs that never reach the target are the slowest."""
    runs = sorted(
        row["runs"],
        key=lambda run: (run["seconds_to_target"] is None, run["seconds_to_target"] or 0),
    )
    return runs[len(runs) // 2]


def _label(row: dict[str, Any]) -> str:
    if row["part"] != "learners":
        return row["strategy"]
    if row["strategy"] == "mirrored":
        return f"MirroredStrategy, {row['devices']} device(s), batch {row['batch_size']}"
    name = "auto: " if row["auto"] else ""
    return f"{name}{row['learners']} learner(s), batch {row['batch_size']}"
