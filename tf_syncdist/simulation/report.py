"""What simulations gave, as text."""

from collections.abc import Iterable, Sequence

import numpy as np

from tf_syncdist.simulation.comparison import Curve, Row

_COLUMNS = ("cutoff", "per second", "of oracle", "workers", "s/round", "late", "busy")

# So many workers are named one by one, and so many points of a curve are shown.
_MOST_WORKERS = 20
_MOST_POINTS = 16


def table(rows: Iterable[Row], oracle_throughput: float) -> str:
    """Returns rows as aligned text, with the oracle at the end.

    Args:
        rows: The rows.
        oracle_throughput: Contributions per second of the oracle.
    """
    lines = [list(_COLUMNS)]
    for row in rows:
        late, busy = row.dropped.sum() / row.computed, row.skipped.sum() / row.computed
        lines.append(
            [
                row.policy,
                f"{row.throughput:.4g}",
                f"{row.oracle_ratio:.3f}",
                f"{row.contributions:.1f}",
                f"{row.round_seconds:.4g}",
                f"{100 * late:.1f} %",
                f"{100 * busy:.1f} %",
            ]
        )
    lines.append(["oracle", f"{oracle_throughput:.4g}", "1.000", *["-"] * 4])
    return aligned(lines)


def drops(row: Row) -> str:
    """Returns how often workers were late, in lines.

    Args:
        row: What a policy gave.
    """
    shares = 100 * row.dropped / row.rounds
    order = np.argsort(-shares, kind="stable")
    summary = (
        f"late per worker: least {shares.min():.1f} %, median {np.median(shares):.1f} %, "
        f"most {shares.max():.1f} % of the rounds"
    )
    shown = order[:_MOST_WORKERS]
    named = ", ".join(f"{w}: {shares[w]:.1f} %" for w in shown)
    which = "by worker" if len(shown) == len(order) else f"the {_MOST_WORKERS} latest workers"
    return f"{summary}\n{which}: {named}"


def curve(swept: Curve) -> str:
    """Returns what backup workers give, as aligned text, with the optimum.

    Args:
        swept: The curve.
    """
    best = max(swept.throughputs)
    at = swept.backup_workers.index(swept.best)
    shown = {round(i) for i in np.linspace(0, len(swept.backup_workers) - 1, _MOST_POINTS)}
    # The neighbourhood of the optimum is what one looks at.
    shown |= {i for i in range(at - 3, at + 4) if 0 <= i < len(swept.backup_workers)}
    lines = [["b", "per second", "of the best"]]
    for i in sorted(shown):
        value = swept.throughputs[i]
        mark = " <- best" if i == at else ""
        lines.append([str(swept.backup_workers[i]), f"{value:.4g}", f"{value / best:.3f}{mark}"])
    return f"{aligned(lines)}\nbest: b = {swept.best}, {best:.4g} contributions per second"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Returns lines of cells as text with columns.

    Args:
        lines: The lines, all of the same length.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
