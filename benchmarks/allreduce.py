"""Measures how long processes on this machine take to sum float32 tensors over all of them.

    python -m benchmarks.allreduce --num_workers=2 --megabytes=1,100 --json_out=allreduce.json

Systems: ours by each transport, whose aggregators are `ps` processes; the peers
MultiWorkerMirroredStrategy (mwms), torch.distributed with gloo, and SyncReplicasOptimizer; and
limits, which are what plain copies and plain sockets take here (see allreduce_limits.py).

Each worker takes the wall time of each of its exchanges, after those that warm it up. All systems
are run in turn, in fresh processes, as often as --repeats says. A row has the median over the
exchanges of all workers and repeats. Under a strategy the time is that of a whole call of a
tf.function, from tensors that are there to a value read from each result; `local` is the time of
such a call without an exchange. For gloo it is the exchange, in place. Before each exchange of
these, outside of the time, tensors are filled anew and the workers wait for each other. For
SyncReplicasOptimizer it is one global step (see allreduce_sync_replicas.py).

In the columns "to X" is the row's median divided by that of X; below 1 is faster than X.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from benchmarks import processes, tensors

_NUM_WORKERS = flags.DEFINE_list("num_workers", ["2"], "Numbers of workers.")
_MEGABYTES = flags.DEFINE_list("megabytes", ["1", "100"], "Sizes of the tensor, in 10**6 bytes.")
_MODEL = flags.DEFINE_enum(
    "model", "", ["", tensors.RESNET50], "Exchange this model's tensors, in place of --megabytes."
)
_TRANSPORT = flags.DEFINE_list("transport", ["shared_memory", "grpc"], "Transports of ours.")
_NUM_SHARDS = flags.DEFINE_list("num_shards", ["1"], "Numbers of aggregators of ours.")
_PEERS = flags.DEFINE_list("peers", ["mwms", "gloo", "sync_replicas"], "Peers to compare with.")
_LIMITS = flags.DEFINE_list("limits", ["memcpy-limit", "socket-limit"], "Limits to compare with.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", None, "Measured exchanges of a run; by default 10 to 200, by size.", lower_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 1, "How often each system is run.", lower_bound=1)
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 300, "Deadline of one run.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows, if given.")

_PEER_NAMES = ("mwms", "gloo", "sync_replicas")
_LIMIT_NAMES = ("memcpy-limit", "socket-limit")
# At least 10 rounds, and as many as move 200 MB, up to 200.
_MIN_ROUNDS, _MAX_ROUNDS, _MEGABYTES_OF_ALL_ROUNDS = 10, 200, 200
_MIN_WARMUP_ROUNDS, _WARMUP_SHARE = 5, 0.2

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """What all systems have to do; no model means one tensor."""

    workers: int
    megabytes: float
    model: str

    @property
    def rounds(self) -> int:
        """How many exchanges of a run are measured."""
        by_size = round(_MEGABYTES_OF_ALL_ROUNDS / self.megabytes)
        return _ROUNDS.value or min(_MAX_ROUNDS, max(_MIN_ROUNDS, by_size))

    @property
    def flags(self) -> list[str]:
        """The flags that all worker processes understand."""
        return [
            f"--megabytes={self.megabytes}",
            f"--model={self.model}",
            f"--rounds={self.rounds}",
            f"--warmup_rounds={max(_MIN_WARMUP_ROUNDS, round(self.rounds * _WARMUP_SHARE))}",
        ]


@dataclasses.dataclass(frozen=True)
class System:
    """What is measured; only ours has shards."""

    name: str
    shards: int | None = None

    def __str__(self) -> str:
        return self.name if self.shards is None else f"{self.name}, {self.shards} shards"


@dataclasses.dataclass
class Samples:
    """What all runs of one system have found for one case."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    extras: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    missing: str | None = None
    failed: str | None = None

    def add(self, name: str, value: float) -> None:
        """Adds a further number of a run."""
        self.extras.setdefault(name, []).append(value)


def _systems() -> list[System]:
    """Returns what to measure, in the order of each repeat."""
    shards = [int(number) for number in _NUM_SHARDS.value]
    ours = [
        System(f"ours-{transport}", number) for transport in _TRANSPORT.value for number in shards
    ]
    return [*ours, *map(System, _PEERS.value), *map(System, _LIMITS.value)]


def _cases() -> list[Case]:
    """Returns what each system has to do."""
    sizes = [float(size) for size in _MEGABYTES.value]
    if _MODEL.value:
        sizes = [tensors.megabytes_of(tensors.shapes(_MODEL.value, 0))]
    workers = [int(number) for number in _NUM_WORKERS.value]
    return [Case(*case, _MODEL.value) for case in itertools.product(workers, sizes)]


def _run(system: System, case: Case, samples: Samples) -> None:
    """Runs one system once and adds what it finds to its samples."""
    worker_flags, services = [case.flags] * case.workers, []
    if system.shards is not None:
        module = "benchmarks.allreduce_strategies"
        transport = system.name.removeprefix("ours-")
        worker_flags = [[*case.flags, "--system=ours", f"--transport={transport}"]] * case.workers
        serve = ["--port={port}", "--quiet", f"--max_seconds={_TIMEOUT_SECONDS.value}"]
        services = [
            processes.Service("tf_syncdist.aggregator", serve) for _ in range(system.shards)
        ]
    elif system.name == "mwms":
        module = "benchmarks.allreduce_strategies"
        worker_flags = [[*case.flags, "--system=mwms"]] * case.workers
    elif system.name == "gloo":
        module = "benchmarks.allreduce_gloo"
    elif system.name == "sync_replicas":
        module = "benchmarks.allreduce_sync_replicas"
        services = [processes.Service(module, [*case.flags, "--give_up_at={give_up_at}"])]
    else:
        module = "benchmarks.allreduce_limits"
        worker_flags = [[*case.flags, f"--system={system.name}", f"--num_workers={case.workers}"]]
    outcomes = processes.run_cluster(module, worker_flags, _TIMEOUT_SECONDS.value, services)
    results = [outcome.result for outcome in outcomes]
    for result in results:
        samples.missing = samples.missing or result.get("missing")
        samples.seconds += result.get("seconds", ())
        if "local_seconds" in result:
            samples.add("local_seconds", result["local_seconds"])
    if system.shards is not None and not samples.missing:
        _add_memory(services, min(result["started_at"] for result in results), samples)


def _add_memory(services: Sequence[processes.Service], started_at: float, samples: Samples) -> None:
    """Adds what the aggregator that needed most memory had before the exchanges, and at most."""
    before = [r.megabytes for s in services for r in s.memory if r.time < started_at]
    peaks = [r.peak_megabytes for s in services for r in s.memory]
    if before:
        samples.add("aggregator_before_mb", max(before))
    if peaks:
        samples.add("aggregator_peak_mb", max(peaks))


def _row(system: System, case: Case, samples: Samples) -> Row:
    """Returns the row of one system in one case."""
    row: Row = {
        "system": system.name,
        "workers": case.workers,
        "megabytes": case.megabytes,
        "model": case.model or None,
        "tensors": len(tensors.shapes(case.model, case.megabytes)),
        "shards": system.shards,
        "rounds": case.rounds,
        "repeats": _REPEATS.value,
        "samples": len(samples.seconds),
        "median_seconds": None,
    }
    if samples.seconds:
        ordered = sorted(samples.seconds)
        last = len(ordered) - 1
        row["median_seconds"] = statistics.median(ordered)
        row["min_seconds"] = ordered[0]
        row["p10_seconds"] = ordered[round(0.1 * last)]
        row["p90_seconds"] = ordered[round(0.9 * last)]
    for name, values in samples.extras.items():
        row[name] = (statistics.median if name == "local_seconds" else max)(values)
    for name in ("missing", "failed"):
        if getattr(samples, name):
            row[name] = getattr(samples, name)
    return row


def _table(rows: Sequence[Row]) -> str:
    """Returns the rows as aligned text, with their ratios to the peers and the limits."""
    references = [*_PEER_NAMES, *_LIMIT_NAMES]
    lines = [["system", "shards", "workers", "MB", "tensors", "median ms", "p10", "p90", "local"]]
    lines[0] += ["MB before", "MB peak", *(f"to {name}" for name in references)]
    for row in rows:
        times = [_milliseconds(row, name) for name in ("median", "p10", "p90", "local")]
        if row["median_seconds"] is None:
            times[0] = "failed" if "failed" in row else "missing"
        memory = [row.get(f"aggregator_{when}_mb") for when in ("before", "peak")]
        cells = [row["system"], row["shards"] or "-", row["workers"], f"{row['megabytes']:g}"]
        cells += [row["tensors"], *times, *("-" if mb is None else f"{mb:.0f}" for mb in memory)]
        cells += [_ratio(row, rows, name) for name in references]
        lines.append([str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _milliseconds(row: Row, name: str) -> str:
    """Returns one of a row's times as it stands in the table."""
    seconds = row.get(f"{name}_seconds")
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def _ratio(row: Row, rows: Sequence[Row], name: str) -> str:
    """Returns how many times longer a row takes than the system `name` in the same case."""
    for other in rows:
        if other["system"] == name and all(
            other[key] == row[key] for key in ("workers", "megabytes", "model")
        ):
            if row["median_seconds"] and other["median_seconds"]:
                return f"{row['median_seconds'] / other['median_seconds']:.2f}"
    return "-"


def _check_flags() -> None:
    """Raises an error for a list that has something unknown in it."""
    for flag, known in ((_PEERS, _PEER_NAMES), (_LIMITS, _LIMIT_NAMES)):
        if not set(flag.value) <= set(known):
            raise app.UsageError(
                f"Expected --{flag.name} to list some of {list(known)}, received {flag.value}; "
                f"use for example --{flag.name}={known[0]}."
            )
    if any(int(number) < 2 for number in _NUM_WORKERS.value):
        raise app.UsageError(
            f"Expected --num_workers to list numbers of at least 2, received {_NUM_WORKERS.value}; "
            "one worker exchanges nothing."
        )


def main(argv: Sequence[str]) -> None:
    """Measures all systems in turn, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    _check_flags()
    found = {pair: Samples() for pair in itertools.product(_cases(), _systems())}
    for _ in range(_REPEATS.value):
        for (case, system), samples in found.items():
            if samples.missing:
                continue
            print(f"measuring {system}: {case} ...", file=sys.stderr, flush=True)
            try:
                _run(system, case, samples)
            except processes.ClusterFailedError as error:
                samples.failed = str(error)
                print(f"{system} failed: {error}", file=sys.stderr, flush=True)
            # An interrupted measurement has its rows, too.
            rows = [_row(system, case, samples) for (case, system), samples in found.items()]
            if _JSON_OUT.value:
                pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2) + "\n")
    print(_table(rows))
    for line in sorted({f"{row['system']}: {row['missing']}" for row in rows if "missing" in row}):
        print(f"missing: {line}")
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
