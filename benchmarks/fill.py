"""Puts the rows of benchmarks as tables into the documentation.

    python -m benchmarks.allreduce --num_workers=2,3 --json_out=allreduce.json
    python -m benchmarks.fit_overhead --json_out=fit.json
    python -m benchmarks.propagation --json_out=propagation.json
    python -m benchmarks.cutoffs --json_out=cutoffs.json
    python -m benchmarks.cutoff_jobs --json_out=cutoff_jobs.json
    python -m benchmarks.mixing --data_dir=DIR --json_out=mixing.json
    python -m benchmarks.fill --rows=allreduce.json,fit.json,propagation.json docs/performance.md
    python -m benchmarks.fill --rows=mixing.json docs/mixing.md

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is
allreduce, fit_overhead, propagation, cutoffs, cutoff_decisions, cutoff_jobs, mixing_learners or
mixing_jobs.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import app, flags

_ROWS = flags.DEFINE_list("rows", None, "Files that --json_out has written.", required=True)

_SYSTEMS = {
    "ours-shared_memory": "shared memory",
    "ours-grpc": "gRPC",
    "gloo": "Gloo",
    "sync_replicas": "SyncReplicasOptimizer",
    "mwms": "MWMS RING",
    "memcpy-limit": "memcpy-limit",
    "socket-limit": "socket-limit",
}
_END = "<!-- end of table -->"

Row = dict[str, Any]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def _allreduce(rows: Sequence[Row]) -> str:
    """Returns milliseconds per exchange, a line for each case, and the ratios that matter."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        # Only ours has shards; all other systems stand in the line of one shard.
        key = (row["workers"], row["megabytes"], row.get("model") or "", row.get("shards") or 1)
        cases.setdefault(key, {})[row["system"]] = row
    lines = [["workers", "MB", *_SYSTEMS.values(), "shared memory to Gloo", "gRPC to RING"]]
    for (workers, megabytes, model, shards), found in sorted(cases.items()):
        what = f"{megabytes:.4g}" + (f" ({model})" if model else "")
        what += f", {shards} shards" if shards > 1 else ""
        peers = cases.get((workers, megabytes, model, 1), {})
        every = peers | found
        cells = [_cell(found.get(name)) for name in _SYSTEMS]
        ratios = [
            _ratio(every.get("ours-shared_memory"), every.get("gloo")),
            _ratio(every.get("ours-grpc"), every.get("mwms")),
        ]
        lines.append([str(workers), what, *cells, *ratios])
    note = "Milliseconds per exchange, medians; ours with one shard unless it is said otherwise."
    return f"{note}\n\n{_markdown(lines)}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    seconds = row["median_seconds"]
    if seconds is None:
        return "failed" if "failed" in row else "missing"
    return f"{1000 * seconds:.3g}"


def _ratio(row: Row | None, other: Row | None) -> str:
    if not row or not other or not row["median_seconds"] or not other["median_seconds"]:
        return ""
    return f"{row['median_seconds'] / other['median_seconds']:.2f}"


def _fit_overhead(rows: Sequence[Row]) -> str:
    """Returns steps per second, a line for each model."""
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        rates.setdefault(row["model"], {})[row["system"]] = row["steps_per_second"]
    lines = [
        [
            "model",
            "no strategy",
            "MirroredStrategy",
            "ours",
            "to no strategy",
            "to MirroredStrategy",
        ]
    ]
    for model, found in rates.items():
        plain, mirrored, ours = (found[name] for name in ("plain", "mirrored", "ours"))
        numbers = [f"{rate:.0f}" for rate in (plain, mirrored, ours)]
        lines.append([model, *numbers, f"{ours / plain:.2f}", f"{ours / mirrored:.2f}"])
    return f"Steps of `fit` per second, medians.\n\n{_markdown(lines)}"


def _propagation(rows: Sequence[Row]) -> str:
    """Returns milliseconds per step, a line for each model and bandwidth."""
    modes = {"no_overlap": "no overlap", "fifo": "fifo", "sliced": "sliced", "priority": "priority"}
    found: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        # Of several sizes of slices the first one is the mode's.
        found.setdefault((row["model"], row["gbps"]), {}).setdefault(row["mode"], row)
    head = ["model", "Gb/s", "computing", "exchange"]
    lines = [[*head, *modes.values(), "priority over fifo", "priority to bound"]]
    for (model, gbps), by_mode in found.items():
        row = next(iter(by_mode.values()))
        steps = {mode: r["step_seconds"] for mode, r in by_mode.items()}
        computing, exchange = row["compute_seconds"], row["exchange_seconds"]
        ratios = ["", ""]
        if "priority" in steps:
            ratios[1] = f"{steps['priority'] / max(computing, exchange):.2f}"
        if "priority" in steps and "fifo" in steps:
            ratios[0] = f"{steps['fifo'] / steps['priority']:.2f}"
        cells = [_milliseconds(seconds) for seconds in (computing, exchange)]
        cells += [_milliseconds(steps.get(mode)) for mode in modes]
        lines.append([model, f"{gbps:.2f}" if gbps else "no limit", *cells, *ratios])
    note = (
        "Milliseconds per step, medians. The last columns: the speed-up of priority over fifo, and "
        "its step by the longer one of computing and exchange."
    )
    return f"{note}\n\n{_markdown(lines)}"


_CUTOFFS = {
    "full": "full",
    "backup:4 %": "b = 4 %",
    "backup:best": "best b",
    "deadline:best": "best deadline",
    "elfving": "Elfving",
    "order_statistics": "order statistics",
    "learned:smoother": "smoother",
    "learned:chains": "chains",
    "learned:network": "network",
    "learned": "learned",
}


def _by_cutoff(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple, dict[str, Row]]:
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        name = row["policy"]
        if name.startswith("backup:") and name != "backup:best":
            name = "backup:4 %"
        found.setdefault(tuple(row[key] for key in keys), {})[name] = row
    return found


def _cutoffs(rows: Sequence[Row]) -> str:
    """Returns throughputs as fractions of the oracle's, a line for each law."""
    lines = [["law", "factor", "workers", "late ones", *_CUTOFFS.values()]]
    keys = ("law", "factor", "workers", "late_workers_stay_busy")
    for (law, factor, workers, busy), found in _by_cutoff(rows, keys).items():
        cells = [f"{found[n]['oracle_ratio']:.3f}" if n in found else "" for n in _CUTOFFS]
        head = [law, f"{factor:g}" if factor else "", f"{workers:,}"]
        lines.append([*head, "busy" if busy else "", *cells])
    note = "Contributions per second, as a fraction of the greedy oracle's."
    return f"{note}\n\n{_markdown(lines)}"


def _cutoff_decisions(rows: Sequence[Row]) -> str:
    """Returns milliseconds per round, a line for each number of workers."""
    planned = [name for name in _CUTOFFS if name.startswith(("elfving", "order", "learned"))]
    lines = [["workers", *(_CUTOFFS[name] for name in planned)]]
    rows = [row for row in rows if row["law"] == "regime_switching" and row["factor"] == 2.5]
    for (workers,), found in sorted(_by_cutoff(rows, ("workers",)).items()):
        cells = [
            f"{1000 * found[n]['decision_seconds']:.2f}" if n in found else "" for n in planned
        ]
        lines.append([f"{workers:,}", *cells])
    note = "Milliseconds per round to take note of the one before and to plan, medians."
    return f"{note}\n\n{_markdown(lines)}"


def _cutoff_jobs(rows: Sequence[Row]) -> str:
    """Returns what real jobs and their simulations gave, a line for each policy."""
    head = ["cutoff", "measured", "simulated", "measured, of oracle", "contributions", "late"]
    lines = [[*head, "replayed"]]
    for row in rows:
        measured = [f"{row[key]:.1f}" for key in ("throughput", "simulated")]
        counts = [" ".join(map(str, row[key])) for key in ("contributed", "late", "replayed")]
        lines.append([row["cutoff"], *measured, f"{row['oracle_ratio']:.3f}", *counts])
    note = "Contributions per second, and for how many rounds each worker did what."
    return f"{note}\n\n{_markdown(lines)}"


def _mixing_learners(rows: Sequence[Row]) -> str:
    """Returns what learners on a device came to, a line for each system."""
    own = ["op threads", "strategy", "learners", "devices", "batch"]
    lines = [[*own, *_MIXING.values(), *_SEEDS_OF_MIXING]]
    for row in rows:
        name = "MirroredStrategy" if row["strategy"] == "mirrored" else "ModelAveragingStrategy"
        learners = f"auto ({row['learners']})" if row["auto"] else str(row["learners"])
        if row["strategy"] == "mirrored":
            learners = ""
        threads = str(row["op_threads"] or "all")
        head = [threads, name, learners, str(row["devices"]), str(row["batch_size"])]
        lines.append([*head, *_mixing_cells(row)])
    return f"Medians; images per second are those of all learners.\n\n{_markdown(lines)}"


def _mixing_jobs(rows: Sequence[Row]) -> str:
    """Returns what jobs came to, a line for each strategy without and with a slow worker."""
    head = ["strategy", "workers", "slow", "batch", *_MIXING.values(), *_SEEDS_OF_MIXING]
    lines = [[*head, "steps/s kept"]]
    for row in sorted(rows, key=lambda row: (row["strategy"], row["straggler"])):
        head = [row["strategy"], str(row["workers"]), "1" if row["straggler"] else ""]
        kept = f"{100 * row['rate_ratio']:.0f} %" if row["straggler"] else ""
        lines.append([*head, str(row["batch_size"]), *_mixing_cells(row), kept])
    note = "Medians; steps per second are those of a worker that is never slow."
    return f"{note}\n\n{_markdown(lines)}"


_MIXING = {
    "seconds_to_target": "s to target",
    "epochs_to_target": "epochs to it",
    "steps_per_second": "steps/s",
    "examples_per_second": "images/s",
}
_SEEDS_OF_MIXING = ("reached it", "each seed's s")


def _mixing_cells(row: Row) -> list[str]:
    values = [row[key] for key in _MIXING]
    cells = ["-" if v is None else f"{v:.3g}" if v < 1000 else f"{v:,.0f}" for v in values]
    seconds = [run["seconds_to_target"] for run in row["runs"]]
    each = " ".join("-" if s is None else f"{s:.3g}" for s in seconds)
    return [*cells, f"{row['reached']} of {len(seconds)}", each]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.0f}"


def main(argv: Sequence[str]) -> None:
    """Fills the tables of the files that are named."""
    rows = [row for path in _ROWS.value for row in json.loads(pathlib.Path(path).read_text())]
    tables = {
        "allreduce": _allreduce([row for row in rows if "median_seconds" in row]),
        "fit_overhead": _fit_overhead([row for row in rows if "ratio_to_plain" in row]),
        "propagation": _propagation([row for row in rows if "exchange_seconds" in row]),
        "cutoffs": _cutoffs([row for row in rows if "decision_seconds" in row]),
        "cutoff_decisions": _cutoff_decisions([row for row in rows if "decision_seconds" in row]),
        "cutoff_jobs": _cutoff_jobs([row for row in rows if "simulated" in row]),
        "mixing_learners": _mixing_learners([r for r in rows if r.get("part") == "learners"]),
        "mixing_jobs": _mixing_jobs(
            [r for r in rows if r.get("part") in ("strategies", "stragglers")]
        ),
    }
    for path in map(pathlib.Path, argv[1:]):
        text = path.read_text()
        for name, table in tables.items():
            begin = f"<!-- table: {name} -->"
            pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(_END)}", re.DOTALL)
            # More than the head and the rule below it.
            if table.count("\n| ") > 2:
                text = pattern.sub(lambda _, b=begin, t=table: f"{b}\n{t}\n{_END}", text)
        path.write_text(text)


if __name__ == "__main__":
    app.run(main)
