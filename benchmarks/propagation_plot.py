"""The figure of benchmarks.propagation: what priorities gain at which bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

# In the paper each of 4 machines is a worker and a server: in either direction its network carries
# three quarters of the model twice.
_PAPER_COPIES = 2 * 3 / 4

_TICKS = (0.25, 0.5, 1, 2, 4)


class _Paper(NamedTuple):
    """What P3 (arXiv 1905.03960) gains over its baseline.

    Args:
        megabytes: Size of the model.
        compute_seconds: Computing of a step, as assumed by the simulations.
        simulated: Bandwidth in Gb/s and speed-up of simulations of the paper's cluster; for VGG-19
            those with a service that adds 3 and updates 1 GB/s.
        reported: The paper's own best point.
    """

    megabytes: float
    compute_seconds: float
    simulated: dict[float, float]
    reported: tuple[float, float]

    def relative(self, gbps: float) -> float:
        """Returns a bandwidth by that on which exchange and computing take equally long."""
        return gbps * self.compute_seconds / (self.megabytes * 8e-3 * _PAPER_COPIES)


_PAPERS = {
    "vgg19": _Paper(574.7, 0.50, {5: 1.12, 10: 1.36, 15: 1.59, 20: 1.41, 30: 1.21}, (15, 1.66)),
    "resnet50": _Paper(
        102.2, 0.33, {1: 1.08, 2: 1.17, 3: 1.25, 4: 1.26, 5: 1.08, 6: 1.0}, (4, 1.26)
    ),
}


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws the speed-up of mode priority over mode fifo against the bandwidth.

    Bandwidths are relative, as ours are chosen to fit a scaled model: at 1 the exchange takes as
    long as the computing.

    Args:
        rows: Rows of the benchmark.
        path: The file; its suffix tells the format.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4), squeeze=False)
    for name, ax in zip(names, axes[0], strict=True):
        curves: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            found = row["mode"] == "priority" and row["model"] == name and row["speedup_over_fifo"]
            if found and row["ratio"]:
                point = (1 / row["ratio"], row["speedup_over_fifo"])
                curves.setdefault(row["slice_elements"], []).append(point)
        for size, points in sorted(curves.items()):
            ax.plot(*zip(*sorted(points), strict=True), "o-", label=f"measured, slices of {size}")
        if paper := _PAPERS.get(name):
            points = [(paper.relative(gbps), gain) for gbps, gain in paper.simulated.items()]
            ax.plot(*zip(*points, strict=True), "s--", color="gray", label="P3, simulated")
            gbps, gain = paper.reported
            ax.plot(paper.relative(gbps), gain, "*", color="black", label="P3, the paper's best")
        ax.axhline(1, color="lightgray", zorder=0)
        ax.set(title=name, xscale="log", xlabel="bandwidth (1: exchange as long as computing)")
        ax.set_xticks(_TICKS, map(str, _TICKS))
        ax.minorticks_off()
        ax.set_ylabel("speed-up of priority over fifo")
        ax.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
