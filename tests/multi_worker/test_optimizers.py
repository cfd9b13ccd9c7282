"""Every optimizer of Keras, and every option of optimizers, with and without a slow worker."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

STEPS = 12
ROUNDS_WHERE_ACCUMULATED = 3

# Sums of two halves differ from the sum of a whole in the last bit of a float32. Adaptive
# optimizers divide small gradients by their own size, so that they end a few bits further apart.
SGD_LIKE = 1e-6
ADAPTIVE = 2e-5
# Gradients of float16 have 11 bits, those of bfloat16 have 8, and each half is rounded on its own.
# Adam divides by the size of gradients, and so makes steps of the size of its learning rate, 0.01,
# out of gradients that are nearly zero.
TOLERANCES = {
    "float16_sgd": 2e-3,
    "eager_float16_sgd": 2e-3,
    "float16_adam": 2e-2,
    "bfloat16_sgd": 2e-2,
    "bfloat16_adam": 4e-2,
}

# Keras 3.10 cannot train with it in one process either: it asks TensorFlow's variables for a path.
BROKEN = ("Muon",) if keras.__version__.startswith("3.10.") else ()

CLASSES = [
    f"class_{name}"
    for name, value in vars(keras.optimizers).items()
    if inspect.isclass(value)
    and issubclass(value, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer", *BROKEN)
]
OPTIONS = [
    "accumulation_sgd",
    "accumulation_adam",
    "accumulation_scaled_sgd",
    "ema_adam",
    "ema_until_the_end_sgd",
    "weight_decay_sgd",
    "constraint_adam",
    "schedule_sgd",
    "scaled_sgd",
    "float16_sgd",
    "float16_adam",
    "bfloat16_sgd",
    "bfloat16_adam",
    "eager_adam",
    "eager_accumulation_sgd",
    "eager_float16_sgd",
    "embedding_sgd",
    "embedding_adam",
    "embedding_eager_adam",
    "embedding_accumulation_sgd",
    "clipnorm_idle_sgd",
    "clipnorm_bites_sgd",
    "global_clipnorm_idle_sgd",
    "global_clipnorm_bites_sgd",
    "clipvalue_idle_sgd",
    "clipvalue_bites_sgd",
]
ALL = [*CLASSES, *OPTIONS]
NOTICE = "executes the whole training function"
NOT_YET = "because its optimizer has not updated anything so far"
CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")


KINDS = (("plain", 0, 0), ("all_needed", 2, 0), ("one_slow", 2, 1))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {}
    for cases in ("options", "classes"):
        for kind, workers, backup_workers in KINDS:
            arguments = {
                "cases": cases,
                "plain": not workers,
                "backup_workers": backup_workers,
                "pause_seconds": 0.1 * backup_workers,
            }
            wanted[f"{kind}_{cases}"] = {"workers": workers, "arguments": arguments}
    with Jobs("optimizers.py", tmp_path_factory, wanted) as started:
        yield started


def _plain(jobs: Jobs, case: str) -> dict[str, Any]:
    return jobs[f"plain_{_part(case)}"].results[0][case]


def test_every_case_of_the_program_is_tested(jobs: Jobs) -> None:
    assert list(jobs["plain_options"].results[0]) == OPTIONS
    assert set(jobs["plain_classes"].results[0]) == set(CLASSES)


@pytest.mark.parametrize("case", ALL)
def test_two_workers_end_as_one_process(case: str, jobs: Jobs) -> None:
    # Where gradients are clipped, one process does by hand what workers do: it clips the gradients
    # of each one's piece, and then adds them.
    expected = _plain(jobs, case)["weights"]
    job = jobs[f"all_needed_{_part(case)}"]
    for received in job.each(case, "weights"):
        assert _difference(received, expected) <= _tolerance(case)
    _check_alike(case, job)


@pytest.mark.parametrize("case", ALL)
def test_a_slow_worker_replays_and_ends_with_the_same_bits(case: str, jobs: Jobs) -> None:
    job = jobs[f"one_slow_{_part(case)}"]
    _check_alike(case, job)
    slow = job.results[1][case]
    assert slow["replayed"] > 0
    assert slow["contributed"] + slow["late"] + slow["replayed"] == slow["rounds"]


@pytest.mark.parametrize("part", ["classes", "options"])
def test_no_optimizer_of_keras_needs_the_whole_function(part: str, jobs: Jobs) -> None:
    for kind in ("all_needed", "one_slow"):
        for task, log in jobs[f"{kind}_{part}"].logs.items():
            said = [line for line in log.splitlines() if NOTICE in line]
            # Without a graph, an optimizer that accumulates is known by its first update only.
            assert [line for line in said if not line.endswith(NOT_YET)] == [], task
            assert len(said) <= (1 if part == "options" and kind == "one_slow" else 0), task


@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_that_does_not_bite_changes_nothing(clip: str, jobs: Jobs) -> None:
    idle = _plain(jobs, f"{clip}_idle_sgd")["weights"]
    assert _difference(_plain(jobs, f"{clip}_bites_sgd")["weights"], idle) > 1e-2


@pytest.mark.parametrize(
    "case", ["accumulation_scaled_sgd", "scaled_sgd", "float16_sgd", "float16_adam"]
)
def test_losses_are_scaled(case: str, jobs: Jobs) -> None:
    assert _plain(jobs, case)["scaled"]
    assert jobs[f"all_needed_{_part(case)}"].common(case, "scaled")


def _check_alike(case: str, job: JobResult) -> None:
    job.common(case, "weights_sha256")
    job.common(case, "optimizer_sha256")
    assert job.common(case, "finite")
    # Where a loss is scaled, every run has an exchange that tells whether gradients are finite.
    accumulated = "accumulation" in case
    assert job.common(case, "iterations") == (ROUNDS_WHERE_ACCUMULATED if accumulated else STEPS)
    scaled = job.common(case, "scaled")
    rounds = ROUNDS_WHERE_ACCUMULATED if accumulated and not scaled else STEPS
    assert job.common(case, "rounds") == rounds


def _part(case: str) -> str:
    return "classes" if case in CLASSES else "options"


def _tolerance(case: str) -> float:
    return TOLERANCES.get(case, SGD_LIKE if case.lower().endswith("sgd") else ADAPTIVE)


def _difference(received: list, expected: list) -> float:
    pairs = zip(received, expected, strict=True)
    return max(float(np.max(np.abs(np.subtract(a, b)), initial=0)) for a, b in pairs)
