"""The figure of benchmarks.cutoffs: how near each policy comes to the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws a group of bars for each law, a bar for each policy.

    Args:
        rows: Rows of the benchmark.
        path: The file; its suffix tells the format.
    """
    from tf_syncdist.simulation.plot import check

    pyplot = check()
    cases = list(dict.fromkeys(_case(row) for row in rows))
    policies = list(dict.fromkeys(_policy(row) for row in rows))
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(cases), 4.5))
    width = 0.85 / len(policies)
    for i, policy in enumerate(policies):
        found = {_case(row): row["oracle_ratio"] for row in rows if _policy(row) == policy}
        at = [j for j, case in enumerate(cases) if case in found]
        heights = [found[cases[j]] for j in at]
        axes.bar(np.array(at) + (i - len(policies) / 2 + 0.5) * width, heights, width, label=policy)
    axes.axhline(1, color="gray", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylabel("throughput, of the oracle's")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _case(row: dict[str, Any]) -> str:
    factor = "" if row["factor"] is None else f"\nfactor {row['factor']:g}"
    return f"{row['law']}{factor}\n{row['workers']} workers"


def _policy(row: dict[str, Any]) -> str:
    # The number of backup workers depends on the number of workers.
    is_fixed = row["policy"].startswith("backup:") and row["policy"] != "backup:best"
    return "backup:4 %" if is_fixed else row["policy"]
