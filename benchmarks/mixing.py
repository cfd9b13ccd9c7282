"""Measures how soon strategies that mix models reach a test accuracy, and what they are up against.

    python -m benchmarks.mixing --data_dir=DIR --json_out=mixing.json --plot=mixing.png
    python -m benchmarks.mixing --data_dir=DIR --parts=learners
    python -m benchmarks.mixing --quick

DIR has MNIST's IDX files; without it, scikit-learn's small digits are learned. All train the same
small convolutional network by SGD with momentum 0.9.

Time runs from where training begins to the first test that reaches the target. It stands still
while the model is tested, and other workers then wait. Everything is traced before, in a few steps
that are undone or change nothing; that is so for all. Rows are medians over seeds, and have the
figures of each seed with them. Systems take turns, so that a change of the machine's load hits all.

The parts:

* learners: `ModelAveragingStrategy` with 1, 2, 4 and "auto" learners on one CPU device, against
  MirroredStrategy with a batch as large as theirs together: on as many logical CPU devices, and on
  one. The learning rate is the same. For "auto", the time in which learners are tried is not
  counted either; each seed's `warmup_seconds` has it in it. With --op_threads=1 no operation is
  cut over the cores, for any of them; learners fill the cores then, where one model cannot.
* strategies: jobs of --num_workers workers, with the same batch for each. Workers share the cores
  of this machine, so each step sleeps for --step_seconds, which stands for the computing of a
  device of the worker's own. The asynchronous parameter server adds up what others average, so it
  has the learning rate divided by the number of workers.
* stragglers: the same jobs with one slow worker, whose step sleeps --slow_factor - 1 times the
  median step of the job without it longer. `steps_per_second` is the median of the other workers',
  in either case, and `rate_ratio` what is left of it.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from benchmarks import mixing_jobs, mixing_learners, mixing_plot, mixing_rows
from benchmarks.mixing_settings import Settings
from benchmarks.turns import TurnProcess

_NAMES = ("learners", "strategies", "stragglers")

_PARTS = flags.DEFINE_list("parts", list(_NAMES), f"What to measure: {', '.join(_NAMES)}.")
_LEARNERS = flags.DEFINE_list("learners", ["1", "2", "4", "auto"], "Learners on a device.")
_STRATEGIES = flags.DEFINE_list(
    "strategies", list(mixing_jobs.STRATEGIES), "Strategies of jobs of several workers."
)
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 4, "Workers of a job.", lower_bound=2)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of the part learners.", lower_bound=1)
_JOB_SEEDS = flags.DEFINE_integer("job_seeds", 3, "Seeds of the part strategies.", lower_bound=1)
_STRAGGLER_SEEDS = flags.DEFINE_integer(
    "straggler_seeds", 1, "Seeds of the part stragglers.", lower_bound=1
)
_TARGET = flags.DEFINE_float("target", 0.97, "Test accuracy to reach in the part learners.")
_JOB_TARGET = flags.DEFINE_float("job_target", 0.93, "Test accuracy to reach in the other parts.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Batch of a learner.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.02, "Learning rate.")
_FILTERS = flags.DEFINE_list("filters", ["8", "16"], "Filters of the network's convolutions.")
_EPOCHS = flags.DEFINE_float("epochs", 10, "Passes over the data after which a run ends.")
_TESTS = flags.DEFINE_integer("tests_per_epoch", 8, "Tests in a pass over the data.", lower_bound=1)
_OP_THREADS = flags.DEFINE_integer(
    "op_threads", 0, "Threads for one operation, of the part learners; 0 is TensorFlow's default."
)
_CENTRAL_MOMENTUM = flags.DEFINE_float(
    "central_momentum", 0.9, "Of the central model, in the part learners."
)
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.02, "Sleep of a step.", lower_bound=0)
_SLOW_FACTOR = flags.DEFINE_float("slow_factor", 10, "Times a slow step takes longer.")
_MOST_SECONDS = flags.DEFINE_float("most_seconds", 40, "Seconds after which a run ends.")
_QUICK = flags.DEFINE_boolean("quick", False, "Whether to see only that everything works.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of MNIST's IDX files.")
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 1200, "Deadline of everything.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows.")
_PLOT = flags.DEFINE_string("plot", None, "File for a figure of accuracy against time.")

# What --quick changes, unless it is given.
_QUICKLY = {
    "learners": ["2"],
    "strategies": ["elastic_averaging", "gossip:pull"],
    "num_workers": 2,
    "seeds": 1,
    "job_seeds": 1,
    "epochs": 1.0,
    "tests_per_epoch": 2,
    "step_seconds": 0.005,
}
# Starting, tracing and meeting, besides training.
_OVERHEAD_SECONDS = 60.0


def _measure() -> tuple[list[mixing_rows.Row], list[str]]:
    """Measures all parts, and returns the rows and what has failed."""
    flags_ = [f"--data_dir={pathlib.Path(_DATA_DIR.value).resolve()}"] if _DATA_DIR.value else []
    give_up_at = time.time() + _TIMEOUT_SECONDS.value
    seconds = _MOST_SECONDS.value + _OVERHEAD_SECONDS
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        server = TurnProcess(
            "mixing", "benchmarks.mixing_server", flags_, pathlib.Path(name), give_up_at
        )

        def start(request: dict[str, Any]) -> list[dict[str, Any]]:
            answer = server.ask(json.dumps({**request, "seconds": seconds}))
            if "failed" in answer:
                raise RuntimeError(f"{answer['failed']}; its log:\n{server.log_tail()}")
            return answer["results"]

        try:
            return _measure_with(start)
        finally:
            server.kill()


def _measure_with(start: mixing_learners.Start) -> tuple[list[mixing_rows.Row], list[str]]:
    settings = Settings(
        batch_size=_BATCH_SIZE.value,
        learning_rate=_LEARNING_RATE.value,
        target=_TARGET.value,
        epochs=_EPOCHS.value,
        most_seconds=_MOST_SECONDS.value,
        tests_per_epoch=_TESTS.value,
        filters=[int(number) for number in _FILTERS.value],
        op_threads=_OP_THREADS.value,
        central_momentum=_CENTRAL_MOMENTUM.value,
    )
    rows: list[mixing_rows.Row] = []
    failures: list[str] = []
    parts = set(_PARTS.value)
    if "learners" in parts:
        rows += mixing_learners.measure(start, _LEARNERS.value, _SEEDS.value, settings)
    if parts & {"strategies", "stragglers"}:
        plan = mixing_jobs.Plan(
            strategies=_STRATEGIES.value,
            num_workers=_NUM_WORKERS.value,
            seeds=_JOB_SEEDS.value if "strategies" in parts else 0,
            straggler_seeds=_STRAGGLER_SEEDS.value if "stragglers" in parts else 0,
            step_seconds=_STEP_SECONDS.value,
            slow_factor=_SLOW_FACTOR.value,
            settings=settings._replace(target=_JOB_TARGET.value),
        )
        found, failures = mixing_jobs.measure(start, plan)
        rows += found
    return rows, failures


def _check() -> None:
    for name, values, known in (
        ("parts", _PARTS.value, _NAMES),
        ("strategies", _STRATEGIES.value, mixing_jobs.STRATEGIES),
    ):
        if not values or not set(values) <= set(known):
            raise app.UsageError(
                f"Expected --{name} to list some of {', '.join(known)}. Received: {values}. "
                f"Write for example --{name}={known[0]}."
            )
    if not all(k == "auto" or (k.isdecimal() and int(k) > 0) for k in _LEARNERS.value):
        raise app.UsageError(
            'Expected --learners to list numbers from 1 and "auto". Received: '
            f"{_LEARNERS.value}. Write for example --learners=1,2,auto."
        )


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    if _QUICK.value:
        for name, value in _QUICKLY.items():
            if not flags.FLAGS[name].present:
                flags.FLAGS[name].value = value
    _check()
    if _PLOT.value:
        # Whoever has no matplotlib is told now, not after minutes.
        try:
            mixing_plot.check()
        except ValueError as error:
            raise app.UsageError(str(error)) from error
    rows, failures = _measure()
    print(mixing_rows.table(rows))
    print("\n".join(["", *mixing_rows.comparisons(rows), *(f"failed: {f}" for f in failures)]))
    if _JSON_OUT.value:
        pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2) + "\n")
    if _PLOT.value:
        mixing_plot.plot(rows, _PLOT.value)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
