"""Measures every cutoff policy on every law of run-times, against an oracle that knows them.

    python -m benchmarks.cutoffs --json_out=cutoffs.json --plot=cutoffs.png
    python -m benchmarks.cutoffs --laws=regime_switching --factors=2.5 --num_workers=158 --seeds=0

Jobs are simulated: the rounds and the policies are those of the service. The model of the learned
policies is trained on a trace of its own, of the same law with another seed. A row is the mean over
the seeds. `decision_seconds` is the median time that a policy takes for a round; it means something
only on a machine that does nothing else. backup:best and deadline:best are the best in hindsight;
learned:network, learned:chains and learned:smoother follow one of the predictors of learned.

The laws change_factor and change_times are regime_switching with a change that the model has not
learned: slow nodes become slow by the factor, which was 1 before; or everything takes 1.5 times
longer. They are measured over rounds 100 to 500 after it.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import cutoff_plot, cutoff_policies
from tf_syncdist.cluster.service_environment import restart_in_service_environment
from tf_syncdist.cutoff import models, traces
from tf_syncdist.cutoff.planning import TrainingRequest
from tf_syncdist.simulation import console, laws, report
from tf_syncdist.simulation.bounds import GreedyOracle
from tf_syncdist.simulation.jobs import simulate

_CHANGES = ("change_factor", "change_times")
_CHANGED_TIMES = 1.5

_LAWS = flags.DEFINE_list(
    "laws",
    [*(name for name in laws.NAMES if name != "regime_switching"), "regime_switching", *_CHANGES],
    "Laws of run-times, such as chen2016 or lognormal:0.3.",
)
_FACTORS = flags.DEFINE_list(
    "factors", ["1.0", "1.6", "2.5"], "By what slow nodes are slower, for regime_switching."
)
_NUM_WORKERS = flags.DEFINE_list("num_workers", ["158"], "Numbers of workers.")
_NODES = flags.DEFINE_integer(
    "nodes", None, "On how many nodes they are. Default: 4; 32 with more than 1,000 workers."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of run-times, traces and trainings.")
_ROUNDS = flags.DEFINE_integer("rounds", 3000, "Rounds of a job.", lower_bound=1)
_TRACE_ROUNDS = flags.DEFINE_integer("trace_rounds", 2000, "Rounds to learn from.", lower_bound=100)
_POLICIES = flags.DEFINE_list(
    "policies", None, "Beginnings of the names of the policies to measure. Default: all."
)
_STAY_BUSY = flags.DEFINE_boolean(
    "late_workers_stay_busy", False, "Whether late workers compute on to the end."
)
_MODELS = flags.DEFINE_string(
    "models", None, "Directory where models are kept, and found again. Default: none."
)
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows.")
_PLOT = flags.DEFINE_string("plot", None, "File for a figure.")

_COLUMNS = {
    "law": "law",
    "factor": "factor",
    "workers": "workers",
    "policy": "policy",
    "throughput": "per second",
    "oracle_ratio": "of oracle",
    "static_ratio": "of best fixed",
    "contributions": "contributions",
    "decision_seconds": "decision ms",
}

Row = dict[str, Any]


class Case:
    """A law with its parameters; jobs and traces of it are drawn from seeds.

    Args:
        name: The law.
        factor: By what slow nodes are slower; `None` for laws without nodes.
        workers: How many workers.
    """

    def __init__(self, name: str, factor: float | None, workers: int) -> None:
        self.name, self.factor, self.workers = name, factor, workers
        self._nodes = _NODES.value or (4 if workers <= 1000 else 32)

    def __str__(self) -> str:
        factor = "" if self.factor is None else f", factor {self.factor:g}"
        return f"{self.name}{factor}, {self.workers} workers"

    def trace(self, seed: int) -> np.ndarray:
        """Returns run-times to learn from."""
        return self._usual().sample(_TRACE_ROUNDS.value, self.workers, _rng(seed, 1))

    def job(self, seed: int) -> tuple[np.ndarray, int]:
        """Returns the run-times of a job, and from which round on it is measured."""
        rng = _rng(seed, 0)
        if self.name not in _CHANGES:
            return self._usual().sample(_ROUNDS.value, self.workers, rng), 0
        before = self._usual().sample(300, self.workers, rng)
        changed = laws.RegimeSwitching(self.factor, self._nodes)
        after = changed.sample(500, self.workers, rng)
        if self.name == "change_times":
            after = _CHANGED_TIMES * after
        return np.concatenate((before, after)), len(before) + 100

    def _usual(self) -> laws.Law:
        if self.factor is None:
            return laws.law(self.name)
        factor = 1.0 if self.name == "change_factor" else self.factor
        return laws.RegimeSwitching(factor, self._nodes)


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose])


def _cases() -> list[Case]:
    cases = []
    for name in _LAWS.value:
        has_nodes = name in (*_CHANGES, "regime_switching")
        factors = [float(f) for f in _FACTORS.value] if has_nodes else [None]
        if name in _CHANGES:
            factors = [max(factors)]
        if not has_nodes:
            laws.law(name)
        cases += [Case(name, f, int(n)) for n in _NUM_WORKERS.value for f in factors]
    return cases


def _wanted(policy: str) -> bool:
    return _POLICIES.value is None or any(policy.startswith(p) for p in _POLICIES.value)


def _model(case: Case, seed: int, directory: pathlib.Path) -> str | None:
    """Returns the file of a model, which is trained unless it is there."""
    if not any(map(_wanted, ("learned", "learned:network", "learned:chains"))):
        return None
    usual = Case("regime_switching", 1.0, case.workers) if case.name == "change_factor" else case
    name = "regime_switching" if usual.name == "change_times" else usual.name
    file = directory / f"{name}-{usual.factor}-{usual.workers}-{_TRACE_ROUNDS.value}-{seed}.npz"
    if not file.exists():
        trace = traces.of_seconds(case.trace(seed))
        model = console.train(TrainingRequest(trace, seed))
        if isinstance(model, str):
            return None
        models.save(file, model)
    return str(file)


def _measure(case: Case, seed: int, directory: pathlib.Path) -> list[Row]:
    """Returns the rows of one seed."""
    seconds, first_round = case.job(seed)
    busy = _STAY_BUSY.value
    oracle = simulate(seconds, GreedyOracle(), busy, first_round).throughput
    model = _model(case, seed, directory)
    found = cutoff_policies.policies(seconds, model, busy, first_round)
    throughputs = {}
    rows = []
    for name, policy in found.items():
        is_fixed = name == "backup:best"
        if not (_wanted(name) or is_fixed):
            continue
        timed = cutoff_policies.Timed(policy)
        outcome = simulate(seconds, timed, busy, first_round)
        throughputs[name] = outcome.throughput
        if _wanted(name):
            rows.append(
                {
                    "law": case.name,
                    "factor": case.factor,
                    "workers": case.workers,
                    "policy": name,
                    "late_workers_stay_busy": busy,
                    "throughput": outcome.throughput,
                    "oracle_ratio": outcome.throughput / oracle,
                    "contributions": float(outcome.contributions.mean()),
                    "decision_seconds": timed.decision_seconds,
                }
            )
        print(f"  {name}: {outcome.throughput / oracle:.3f}", file=sys.stderr, flush=True)
    for row in rows:
        row["static_ratio"] = row["throughput"] / throughputs["backup:best"]
    return rows


def _means(rows_of_seeds: Sequence[Sequence[Row]], seeds: Sequence[int]) -> list[Row]:
    """Returns the rows of all seeds as one for each policy."""
    means: dict[str, list[Row]] = {}
    for row in (row for rows in rows_of_seeds for row in rows):
        means.setdefault(row["policy"], []).append(row)
    numbers = ("throughput", "oracle_ratio", "static_ratio", "contributions", "decision_seconds")
    return [
        {
            **rows[0],
            **{key: statistics.fmean(row[key] for row in rows) for key in numbers},
            "seeds": list(seeds),
            "oracle_ratios": [row["oracle_ratio"] for row in rows],
        }
        for rows in means.values()
    ]


def _table(rows: Sequence[Row]) -> str:
    def cell(key: str, value: Any) -> str:
        if value is None:
            return "-"
        if key == "decision_seconds":
            return f"{1e3 * value:.2f}"
        if key in ("throughput", "contributions"):
            return f"{value:.4g}"
        return f"{value:.3f}" if key.endswith("ratio") else str(value)

    lines = [list(_COLUMNS.values())]
    lines += [[cell(key, row[key]) for key in _COLUMNS] for row in rows]
    return report.aligned(lines)


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    try:
        cases, seeds = _cases(), [int(seed) for seed in _SEEDS.value]
    except ValueError as e:
        raise app.UsageError(str(e)) from e
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(_MODELS.value or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for case in cases:
            of_seeds = []
            for seed in seeds:
                print(f"{case}, seed {seed}", file=sys.stderr, flush=True)
                of_seeds.append(_measure(case, seed, directory))
            rows += _means(of_seeds, seeds)
            if _JSON_OUT.value:
                pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2))
    print(_table(rows))
    if _PLOT.value:
        cutoff_plot.plot(rows, _PLOT.value)


if __name__ == "__main__":
    # Decisions take as long as in the service.
    restart_in_service_environment()
    app.run(main)
