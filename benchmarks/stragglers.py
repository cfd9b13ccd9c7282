"""Measures how the step time follows the fast workers when one worker is slow.

    python -m benchmarks.stragglers --json_out=stragglers.json

Every worker is a process on this machine whose step sleeps for a fixed time, so the cores of the
machine do not decide the result. In the delayed configurations the last worker sleeps ten times
longer. Rates count whole rounds on the workers that are not delayed, after the warm-up rounds.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks import processes

_NUM_WORKERS = flags.DEFINE_integer("num_workers", 4, "Workers of a cluster.", lower_bound=2)
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.05, "Sleep of a step.", lower_bound=0)
_SLOW_FACTOR = flags.DEFINE_float("slow_factor", 10, "Times a slow step sleeps longer.")
_ROUNDS = flags.DEFINE_integer("rounds", 60, "Measured rounds.", lower_bound=1)
_WARMUP_ROUNDS = flags.DEFINE_integer(
    "warmup_rounds", 10, "Rounds before the measured ones.", lower_bound=1
)
_PROBABILITY = flags.DEFINE_float(
    "probability",
    0.0,
    "If positive, also measure clusters where each step of each worker is slow with this "
    "probability.",
    lower_bound=0,
    upper_bound=1,
)
_SYSTEMS = flags.DEFINE_list(
    "systems", ["ours", "mwms"], "What to measure: ours, mwms (MultiWorkerMirroredStrategy)."
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 1, "How often to run all configurations in turn; rows are medians.", lower_bound=1
)
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 120, "Deadline of one configuration.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows, if given.")

# The summation order differs between workers of the peer, but not by more than rounding.
_WEIGHT_TOLERANCE = 1e-4
_NAMES = {"ours": "tf_syncdist", "mwms": "MultiWorkerMirroredStrategy"}
_COLUMNS = {
    "system": "system",
    "workers": "workers",
    "backup_workers": "backup",
    "delay": "delay",
    "rounds_per_second": "rounds/s",
    "straggler_lag_seconds": "lag s",
    "exit_seconds": "exit s",
    "contributed": "contributed",
    "late": "late",
    "replayed": "replayed",
}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A cluster to measure; delay is "none", "one" slow worker or "random" slow steps."""

    system: str
    workers: int
    backup_workers: int
    delay: str

    def slow_probability(self, worker_index: int) -> float:
        """Returns the probability that a step of this worker is slow."""
        if self.delay == "random":
            return _PROBABILITY.value
        return float(self.is_delayed(worker_index))

    def is_delayed(self, worker_index: int) -> bool:
        """Returns whether all steps of this worker are slow."""
        # The last one, as worker 0 has duties beyond training.
        return self.delay == "one" and worker_index == self.workers - 1

    def __str__(self) -> str:
        delay = {
            "none": "none delayed",
            "one": f"1 delayed {_SLOW_FACTOR.value:g} times",
            "random": f"steps delayed with probability {_PROBABILITY.value:g}",
        }[self.delay]
        backup = f", b={self.backup_workers}" if self.system == "ours" else ""
        return f"{_NAMES[self.system]}, {self.workers} workers, {delay}{backup}"


def _configurations(systems: Sequence[str]) -> list[Configuration]:
    """Returns what to measure."""
    workers = _NUM_WORKERS.value
    configurations = []
    if "ours" in systems:
        # The reference of the ratio stands next to what is compared with it, so that a change of
        # the load of the machine hits both.
        configurations += [
            Configuration("ours", workers - 1, 0, "none"),
            Configuration("ours", workers, 1, "one"),
            Configuration("ours", workers, 0, "one"),
            Configuration("ours", workers, 0, "none"),
            Configuration("ours", workers, 1, "none"),
        ]
        if _PROBABILITY.value:
            configurations += [
                Configuration("ours", workers, backup, "random")
                for backup in range(min(3, workers))
            ]
    if "mwms" in systems:
        configurations += [Configuration("mwms", workers, 0, delay) for delay in ("none", "one")]
    return configurations


def _measure(configuration: Configuration, seed: int) -> Row:
    """Runs one cluster and returns its row."""
    worker_flags = [
        [
            f"--system={configuration.system}",
            f"--backup_workers={configuration.backup_workers}",
            f"--step_seconds={_STEP_SECONDS.value}",
            f"--slow_factor={_SLOW_FACTOR.value}",
            f"--slow_probability={configuration.slow_probability(index)}",
            f"--warmup_rounds={_WARMUP_ROUNDS.value}",
            f"--rounds={_ROUNDS.value}",
            f"--seed={seed}",
        ]
        for index in range(configuration.workers)
    ]
    outcomes = processes.run_cluster(
        "benchmarks.straggler_worker", worker_flags, _TIMEOUT_SECONDS.value
    )
    results = [outcome.result for outcome in outcomes]
    _check_weights([result["weight_sum"] for result in results])
    fast = [result for index, result in enumerate(results) if not configuration.is_delayed(index)]
    slow = [result for index, result in enumerate(results) if configuration.is_delayed(index)]
    last_end = max(result["ended_at"] for result in results)
    row = {
        **dataclasses.asdict(configuration),
        # Random delays hit every worker, which is neither 0 nor 1 delayed workers.
        "delayed": None if configuration.delay == "random" else len(slow),
        "probability": _PROBABILITY.value if configuration.delay == "random" else None,
        "rounds_per_second": _ROUNDS.value
        / statistics.median(result["seconds"] for result in fast),
        "step_seconds": _STEP_SECONDS.value,
        "slow_factor": _SLOW_FACTOR.value,
        "rounds": _ROUNDS.value,
        "straggler_lag_seconds": slow[0]["ended_at"] - max(result["ended_at"] for result in fast)
        if slow
        else None,
        "exit_seconds": max(outcome.exited_at for outcome in outcomes) - last_end,
    }
    for name in results[0]["counts"]:
        row[name] = [result["counts"][name] for result in results]
    return row


def _check_weights(sums: Sequence[float]) -> None:
    """Raises an error if the workers did not train the same model."""
    if max(sums) - min(sums) > _WEIGHT_TOLERANCE * max(sums):
        raise processes.ClusterFailedError(
            f"Expected all workers to end with the same weights, got sums of their absolute "
            f"values {sums}; the rates of such a cluster mean nothing, so look for the error in "
            "the strategy first."
        )


def _median_row(rows: Sequence[Row]) -> Row:
    """Returns the row of the repeat with the median rate, together with the rates of all."""
    rates = [row["rounds_per_second"] for row in rows]
    median = statistics.median_low(rates)
    return {**rows[rates.index(median)], "repeated_rounds_per_second": rates}


def _cell(value: Any) -> str:
    """Returns a value of a row as it stands in the table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _table(rows: Iterable[Row]) -> str:
    """Returns the rows as aligned text."""
    lines = [list(_COLUMNS.values())]
    lines += [[_cell(row.get(column)) for column in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _ratios(rates: Mapping[Configuration, float]) -> list[str]:
    """Returns a sentence for each comparison whose two sides were measured."""
    workers = _NUM_WORKERS.value
    without_slow = Configuration("ours", workers - 1, 0, "none")
    peer = Configuration("mwms", workers, 0, "none")
    peer_slow = Configuration("mwms", workers, 0, "one")
    undelayed = Configuration("ours", workers, 0, "none")
    slow = f"{workers} workers, 1 of them {_SLOW_FACTOR.value:g} times slower"
    comparisons = [
        *(
            (
                Configuration("ours", workers, backup, "one"),
                without_slow,
                f"{slow}, b={backup}",
                f"{workers - 1} workers without the slow one",
            )
            for backup in (0, 1)
        ),
        (peer_slow, peer, f"{slow}, {_NAMES['mwms']}", "the same without delay"),
        (undelayed, peer, f"{workers} workers, none slow, b=0", _NAMES["mwms"]),
    ]
    comparisons += [
        (
            Configuration("ours", workers, backup, "random"),
            undelayed,
            f"{workers} workers, steps slow with probability {_PROBABILITY.value:g}, b={backup}",
            f"{workers} workers without delay, b=0",
        )
        for backup in range(min(3, workers))
    ]
    return [
        f"{what}: {100 * rates[ours] / rates[reference]:.0f} % of the rate of {reference_name}"
        for ours, reference, what, reference_name in comparisons
        if ours in rates and reference in rates
    ]


def main(argv: Sequence[str]) -> None:
    """Measures all configurations, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    systems = _SYSTEMS.value
    if not systems or not set(systems) <= set(_NAMES):
        raise app.UsageError(
            f"Expected --systems to list some of {list(_NAMES)}, received {systems}; "
            "use for example --systems=ours."
        )
    measured: dict[Configuration, list[Row]] = {}
    failures: list[str] = []
    ours_failed = False
    for repeat in range(_REPEATS.value):
        for configuration in _configurations(systems):
            print(f"measuring {configuration} ...", file=sys.stderr, flush=True)
            try:
                row = _measure(configuration, repeat)
            except processes.ClusterFailedError as error:
                who = "peer" if configuration.system == "mwms" else "ours"
                failures.append(f"{who} failed: {configuration}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
                ours_failed |= configuration.system == "ours"
            else:
                measured.setdefault(configuration, []).append(row)
    medians = {key: _median_row(rows) for key, rows in measured.items()}
    print(_table(medians.values()))
    ratios = _ratios({key: row["rounds_per_second"] for key, row in medians.items()})
    print("\n".join(["", *ratios, *(failure.splitlines()[0] for failure in failures)]))
    if _JSON_OUT.value:
        pathlib.Path(_JSON_OUT.value).write_text(json.dumps(list(medians.values()), indent=2))
    if ours_failed:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
