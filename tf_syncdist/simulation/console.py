"""`python -m tf_syncdist.simulate`: from its flags to what it prints."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tf_syncdist.aggregation.training import Training
from tf_syncdist.cutoff import CutoffPolicy, traces
from tf_syncdist.cutoff.learned import LEAST_ROUNDS, LearnedCutoff
from tf_syncdist.cutoff.planning import TrainingRequest
from tf_syncdist.simulation import comparison, filling, laws, names, plot, report

if TYPE_CHECKING:
    from tf_syncdist.cutoff.models import RunTimeModel

_WORKERS = 100
_ROUNDS = 1000
_CUTOFFS = ("backup:4",)
_CUTOFFS_OF_TRACES = ("full", "backup:1", "backup:2", "learned")
_WARMUP_ROUNDS = 500


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is to be simulated; `None` stands for a default. See the flags of `simulate`."""

    workers: int | None = None
    rounds: int | None = None
    law: str | None = None
    nodes: int | None = None
    trace: str | None = None
    cutoffs: Sequence[str] | None = None
    sweep: bool = False
    late_workers_stay_busy: bool = False
    first_round: int | None = None
    seed: int = 0
    plot: str | None = None
    json_out: str | None = None


class _Times(NamedTuple):
    """Run-times, and where they are from."""

    seconds: np.ndarray
    source: str


def run(arguments: Arguments) -> None:
    """Simulates and prints.

    Raises:
        ValueError: If the arguments make no sense.
    """
    if arguments.plot:
        plot.check()
    times = _times(arguments)
    seconds = times.seconds
    policies, first_round = _policies(arguments, *seconds.shape)
    print(f"{times.source}: {seconds.shape[1]} workers, {len(seconds)} rounds", flush=True)
    if first_round:
        print(f"measured from round {first_round} on; policies learn from those before")
    busy = arguments.late_workers_stay_busy
    compared = comparison.compare(seconds, policies, busy, first_round, train)
    print(report.table(compared.rows, compared.oracle_throughput))
    for row in compared.rows:
        print(f"\n{row.policy}: {row.reason}\n{report.drops(row)}")
    swept = comparison.sweep(seconds[first_round:], busy) if arguments.sweep else None
    if swept:
        print(f"\n{report.curve(swept)}")
    if arguments.plot:
        plot.draw(arguments.plot, times.source, compared.rows, compared.oracle_throughput, swept)
    if arguments.json_out:
        data = _data(arguments, times.source, compared, swept)
        Path(arguments.json_out).write_text(json.dumps(data, indent=2))


def train(request: TrainingRequest) -> "RunTimeModel | str":
    """Trains a run-time model in a process of its own and waits for it.

    Args:
        request: What to train on.

    Returns:
        The model, or in words why there is none.
    """
    rounds, workers = request.trace.num_rounds, request.trace.num_workers
    said = f"training a model on {rounds} rounds of {workers} workers; this takes a minute or two"
    print(said, file=sys.stderr, flush=True)
    with Training() as training:
        training.start(request)
        while (result := training.poll()) is None:
            time.sleep(0.1)
    if isinstance(result, str):
        print(f"no model was trained: {result}", file=sys.stderr, flush=True)
    return result


def _times(arguments: Arguments) -> _Times:
    name = arguments.law or ("trace" if arguments.trace else "chen2016")
    if (name == "trace") != bool(arguments.trace):
        raise ValueError(
            "Expected --law=trace together with --trace=FILE, and no other law with a trace. "
            f"Received: --law={name}, --trace={arguments.trace}."
        )
    if arguments.trace:
        return _recorded(arguments.trace, arguments)
    workers = _WORKERS if arguments.workers is None else arguments.workers
    if workers < 1:
        raise ValueError(f"Expected at least one worker. Received: --workers={workers}.")
    rng = np.random.default_rng(arguments.seed)
    law = laws.law(name, arguments.nodes)
    return _Times(law.sample(arguments.rounds or _ROUNDS, workers, rng), name)


def _recorded(path: str, arguments: Arguments) -> _Times:
    trace = traces.load(path, arguments.workers)
    if arguments.rounds is not None and arguments.rounds > trace.num_rounds:
        raise ValueError(
            f"Expected at most {trace.num_rounds} rounds, as the trace has. "
            f"Received: --rounds={arguments.rounds}."
        )
    filled = filling.fill(trace.part(0, arguments.rounds), arguments.seed)
    if filled.late or filled.absent:
        print(
            f"note: {filled.late + filled.absent} of {filled.seconds.size} times were not measured "
            f"({filled.late} of late workers, {filled.absent} of absent ones) and are drawn from "
            "those that were. Record with full sync to know them all."
        )
    return _Times(filled.seconds, f"trace {Path(path).name}")


def _policies(
    arguments: Arguments, rounds: int, workers: int
) -> tuple[dict[str, CutoffPolicy], int]:
    """Returns the policies by name, and from which round on they are measured."""
    texts = arguments.cutoffs or (_CUTOFFS_OF_TRACES if arguments.trace else _CUTOFFS)
    if arguments.cutoffs is None:
        # Defaults do not have to fit every trace.
        texts = [t for t in texts if not t.startswith("backup:") or int(t[7:]) < workers]
        if rounds < 2 * LEAST_ROUNDS and "learned" in texts:
            texts.remove("learned")
            print(f"note: learned is left out, as it takes {2 * LEAST_ROUNDS} rounds")
    warmup = min(_WARMUP_ROUNDS, rounds // 2)
    policies: dict[str, CutoffPolicy] = {}
    learns = False
    for text in texts:
        policy = names.cutoff(text, workers)
        if isinstance(policy, LearnedCutoff) and policy.model is None:
            if warmup < LEAST_ROUNDS:
                raise ValueError(
                    f"Expected at least {2 * LEAST_ROUNDS} rounds for --cutoff=learned, half of "
                    f"them to learn from. Received: {rounds}. Give more, or learned:FILE."
                )
            policy, learns = LearnedCutoff(warmup_rounds=warmup), True
        policies[text] = policy
    first = arguments.first_round
    if first is None:
        first = warmup if learns else 0
    if first >= rounds:
        raise ValueError(
            f"Expected --first_round to be one of the {rounds} rounds. "
            f"Received: --first_round={first}."
        )
    return policies, first


def _data(
    arguments: Arguments,
    source: str,
    compared: comparison.Comparison,
    swept: comparison.Curve | None,
) -> dict[str, Any]:
    rows = [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row._asdict().items()}
        for row in compared.rows
    ]
    return {
        "source": source,
        "late_workers_stay_busy": arguments.late_workers_stay_busy,
        "oracle_throughput": compared.oracle_throughput,
        "rows": rows,
        "sweep": swept and {**swept._asdict(), "best": swept.best},
    }
