"""Measures cutoff policies on real jobs, and compares them with the simulator.

    python -m benchmarks.cutoff_jobs --json_out=cutoff_jobs.json

Every worker is a process on this machine whose step sleeps as long as a script says, in which
workers become slow now and then and stay so for a while. So the cores of the machine hardly matter.
The script is the same for all policies. The simulator is given its times, and late workers stay
busy there, too. The model of `learned` is trained on a script of another seed.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from benchmarks import cutoff_script, processes
from tf_syncdist.cutoff import models, traces
from tf_syncdist.cutoff.planning import TrainingRequest
from tf_syncdist.simulation import console, names, report
from tf_syncdist.simulation.bounds import GreedyOracle
from tf_syncdist.simulation.jobs import simulate

_CUTOFFS = flags.DEFINE_list(
    "cutoffs",
    ["full", "backup:1", "backup:2", "deadline:0.05", "elfving", "order_statistics", "learned"],
    f"What to measure: {names.FORMS}.",
)
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 4, "Workers of a job.", lower_bound=2)
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.1, "Sleep of a step that is not slow.")
_FACTOR = flags.DEFINE_float("factor", 2.5, "How much longer a slow worker sleeps.")
_ROUNDS = flags.DEFINE_integer("rounds", 300, "Measured rounds.", lower_bound=1)
_WARMUP_ROUNDS = flags.DEFINE_integer(
    "warmup_rounds", 20, "Rounds before the measured ones.", lower_bound=1
)
_TRACE_ROUNDS = flags.DEFINE_integer("trace_rounds", 2000, "Rounds that a model is trained on.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the script.", lower_bound=0)
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 300, "Deadline of one job.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows.")

_COLUMNS = {
    "cutoff": "cutoff",
    "throughput": "per second",
    "oracle_ratio": "of oracle",
    "simulated": "simulated",
    "simulated_ratio": "of oracle",
    "contributions": "workers",
    "contributed": "contributed",
    "late": "late",
    "replayed": "replayed",
}

Row = dict[str, Any]


def _script(rounds: int, seed: int) -> Any:
    return cutoff_script.seconds(
        rounds, _NUM_WORKERS.value, _STEP_SECONDS.value, _FACTOR.value, seed
    )


def _train(directory: pathlib.Path) -> str:
    """Returns the name of `learned` with a model of another script."""
    trace = traces.of_seconds(_script(_TRACE_ROUNDS.value, _SEED.value + 1))
    model = console.train(TrainingRequest(trace, _SEED.value))
    if isinstance(model, str):
        raise processes.ClusterFailedError(f"No model was trained: {model}")
    models.save(directory / "model.npz", model)
    return f"learned:{directory / 'model.npz'}"


def _measure(label: str, cutoff: str, oracle: float) -> Row:
    """Runs one job and its simulation and returns the row."""
    worker_flags = [
        f"--cutoff={cutoff}",
        f"--step_seconds={_STEP_SECONDS.value}",
        f"--factor={_FACTOR.value}",
        f"--warmup_rounds={_WARMUP_ROUNDS.value}",
        f"--rounds={_ROUNDS.value}",
        f"--seed={_SEED.value}",
    ]
    num_workers = _NUM_WORKERS.value
    outcomes = processes.run_cluster(
        "benchmarks.cutoff_worker", [worker_flags] * num_workers, _TIMEOUT_SECONDS.value
    )
    results = [outcome.result for outcome in outcomes]
    counts = {key: [result["counts"][key] for result in results] for key in results[0]["counts"]}
    warmup = _WARMUP_ROUNDS.value
    simulated = simulate(
        _script(warmup + _ROUNDS.value, _SEED.value),
        names.cutoff(cutoff, num_workers),
        late_workers_stay_busy=True,
        first_round=warmup,
    )
    # A worker that is behind begins and ends its measured rounds later.
    seconds = min(result["seconds"] for result in results)
    throughput = sum(counts["contributed"]) / seconds
    return {
        "cutoff": label,
        "workers": num_workers,
        "factor": _FACTOR.value,
        "throughput": throughput,
        "oracle_ratio": throughput / oracle,
        "simulated": simulated.throughput,
        "simulated_ratio": simulated.throughput / oracle,
        "contributions": sum(counts["contributed"]) / _ROUNDS.value,
        **counts,
        "report": results[0]["report"],
    }


def _cell(key: str, value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.3f}" if key.endswith("ratio") else f"{value:.2f}"
    return str(value)


def main(argv: Sequence[str]) -> None:
    """Measures all policies, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    script = _script(_WARMUP_ROUNDS.value + _ROUNDS.value, _SEED.value)
    oracle = simulate(script, GreedyOracle(), True, _WARMUP_ROUNDS.value).throughput
    rows: list[Row] = []
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for label in _CUTOFFS.value:
            print(f"measuring {label} ...", file=sys.stderr, flush=True)
            try:
                cutoff = _train(pathlib.Path(temporary)) if label == "learned" else label
                rows.append(_measure(label, cutoff, oracle))
            except processes.ClusterFailedError as e:
                failed = True
                print(f"{label} failed: {e}", file=sys.stderr, flush=True)
    lines = [list(_COLUMNS.values())]
    lines += [[_cell(key, row[key]) for key in _COLUMNS] for row in rows]
    print(report.aligned(lines))
    print(f"\nthe oracle, simulated: {oracle:.2f} contributions per second")
    if _JSON_OUT.value:
        pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
