"""Figures of simulations. Needs matplotlib, the extra `plot`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_syncdist.simulation.comparison import Curve, Row


def check() -> Any:
    """Returns matplotlib's pyplot, drawing into files only.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as e:
        raise ValueError(
            f"Expected matplotlib for --plot. Received: {e}. "
            "Install it with `pip install 'tf-syncdist[plot]'`, or leave --plot out."
        ) from e
    return pyplot


def draw(
    path: str,
    title: str,
    rows: Sequence[Row],
    oracle_throughput: float,
    swept: Curve | None = None,
) -> None:
    """Draws what policies gave, beside the curve of backup workers or who was late.

    Args:
        path: The file; its ending says the format.
        title: What stands above.
        rows: What the policies gave.
        oracle_throughput: Contributions per second of the oracle.
        swept: The curve, if there is one.
    """
    pyplot = check()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    names = [row.policy for row in rows]
    left.barh(names[::-1], [row.throughput for row in rows][::-1], color="tab:blue")
    left.axvline(oracle_throughput, color="black", linestyle="--", label="oracle")
    left.set(xlabel="contributions per second", title=title)
    left.legend(loc="lower left")
    if swept:
        right.plot(swept.backup_workers, swept.throughputs, "-", label="backup:b")
        best = max(swept.throughputs)
        right.plot([swept.best], [best], "o", color="tab:red", label=f"best, b = {swept.best}")
        right.set(xlabel="backup workers b", ylabel="contributions per second")
    else:
        for row in rows:
            shares = 100 * np.sort(row.dropped)[::-1] / row.rounds
            right.plot(np.arange(len(shares)), shares, label=row.policy)
        right.set(xlabel="workers, latest first", ylabel="late, % of the rounds")
    right.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
