"""Measures the time to a given test accuracy of the strategies that mix models, and of their peers.

    python -m benchmarks.mixing --data_dir=DIR --json_out=mixing.json --plot=mixing.png
    python -m benchmarks.mixing --data_dir=DIR --parts=learners

DIR has MNIST's IDX files; without it, scikit-learn's small digits are learned. All train the same
small convolutional network with SGD and momentum 0.9, with the same learning rate, in batches of
the same size for each learner or worker.

Time runs from where training begins to the first test that reaches the target. It stands still
while the model is tested. Everything is traced before, in a few steps that are undone: that is so
for all systems. Rows are medians over seeds, and have the figures of each seed with them.

The parts:

* learners: `ModelAveragingStrategy` with 1, 2, 4 and "auto" learners on one CPU device, against
  MirroredStrategy with a batch as large as theirs together, once on as many logical CPU devices as
  there are learners, and once on one. They take turns, each in a process of its own. For "auto" the
  time in which learners are tried is not counted either; `warmup_seconds` has it in it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from absl import app, flags

from benchmarks import mixing_learners, mixing_rows

_PARTS = flags.DEFINE_multi_enum("part", ["learners"], ["learners"], "What to measure.")
_LEARNERS = flags.DEFINE_list("learners", ["1", "2", "4", "auto"], "Learners on a device.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "How many seeds.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Batch of each learner.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.02, "Learning rate of all.")
_TARGET = flags.DEFINE_float("target", 0.97, "Test accuracy to be reached.")
_EPOCHS = flags.DEFINE_float("epochs", 10, "Passes over the data after which a run ends.")
_TESTS = flags.DEFINE_integer("tests_per_epoch", 8, "Tests in a pass over the data.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of MNIST's IDX files.")
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 900, "Deadline of a part.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows.")


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    common = [
        f"--learning_rate={_LEARNING_RATE.value}",
        f"--target={_TARGET.value}",
        f"--epochs={_EPOCHS.value}",
        f"--tests_per_epoch={_TESTS.value}",
        *([f"--data_dir={pathlib.Path(_DATA_DIR.value).resolve()}"] if _DATA_DIR.value else []),
    ]
    rows = mixing_learners.measure(
        _LEARNERS.value, _SEEDS.value, _BATCH_SIZE.value, common, _TIMEOUT_SECONDS.value
    )
    print(mixing_rows.table(rows))
    print("\n".join(["", *mixing_rows.comparisons(rows)]))
    if _JSON_OUT.value:
        pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
