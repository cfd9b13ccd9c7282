"""What tests of the strategies in which nobody waits have in common.

`programs/mixing.py` lets workers take turns; `replay` calculates what comes of it with the rules of
`tf_syncdist.mixing` alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .harness import JobResult

# Some runs of one worker follow each other, some alternate.
TWO = [0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0]
THREE = [0, 0, 1, 2, 0, 1, 2, 1, 0, 2, 2, 0, 1, 1, 2, 0]
LEARNING_RATE, MOMENTUM = np.float32(0.05), np.float32(0.9)

Model = np.ndarray


def job(kind: str, workers: int = 2, parts: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """Returns what `Jobs` needs for a job of `programs/mixing.py`."""
    return {
        "workers": workers,
        "arguments": {
            "kind": kind,
            "options": options,
            "schedule": THREE if workers == 3 else TWO,
            "parts": list(parts),
            "slow": 1,
        },
    }


class Rule(Protocol):
    """How models are mixed, one turn after the other."""

    def run(
        self, worker: int, step: Callable[[Model], Model], drew_itself: bool
    ) -> tuple[Model, Model]:
        """Does a worker's run.

        Args:
            worker: The worker.
            step: Returns what its optimizer adds, given the model whose gradient it takes.
            drew_itself: Whether it drew itself as its partner.

        Returns:
            Its model before the step, and what everything outside of training sees after the run.
        """
        ...

    @property
    def end(self) -> Model:
        """What everything outside of training sees in the end."""
        ...


class Momentum:
    """Keras' SGD for one worker of a linear model with the mean square error."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = np.array(x, np.float32), np.array(y, np.float32)
        self.velocity = np.zeros(4, np.float32)
        self.steps = 0

    def step(self, model: Model) -> Model:
        """Returns what it adds to the model for the next batch."""
        x, y = self.x[self.steps], self.y[self.steps]
        self.steps += 1
        error = x @ model[:3, None] + model[3] - y
        gradient = np.append(2 * (x * error).mean(0), 2 * error.mean())
        self.velocity = MOMENTUM * self.velocity - LEARNING_RATE * gradient.astype(np.float32)
        return self.velocity


def replay(found: JobResult, part: str, rule: Callable[[Model], Rule], workers: int = 2) -> None:
    """Checks that workers that took turns came to what the rule says, run by run.

    Args:
        found: What they have written.
        part: "fit" or "loop".
        rule: Returns the rule, given the model with which all begin.
        workers: How many there are.
    """
    results = [found.results[w][part] for w in range(workers)]
    mixes = rule(np.array(results[0]["start"], np.float32))
    optimizers = [Momentum(r["x"], r["y"]) for r in results]
    drawn = (
        [0] * workers
        if part == "fit"
        else [found.results[w]["fit"]["drawn"][-1] for w in range(workers)]
    )
    for turn, worker in enumerate(THREE if workers == 3 else TWO):
        number, mine = optimizers[worker].steps, results[worker]
        drew_itself = mine["drawn"][number] > drawn[worker]
        drawn[worker] = mine["drawn"][number]
        before, seen = mixes.run(worker, optimizers[worker].step, drew_itself)
        received = mine["own"][number] if part == "loop" else mine["seen"][number]
        expected = before if part == "loop" else seen
        assert np.allclose(received, expected, rtol=1e-5, atol=1e-6), (turn, worker)
    for result in results:
        assert np.allclose(result["end"], mixes.end, rtol=1e-5, atol=1e-6)


def check_keras(found: JobResult, steps: int) -> None:
    """Checks what `fit` and what is around it has come to.

    Args:
        found: What the workers have written.
        steps: How many steps each has made in its first fit.
    """
    evaluated = found.common("keras", "evaluated")
    # A quarter by chance.
    assert evaluated["accuracy"] > 0.5
    assert found.common("keras", "again") == evaluated
    predicted = found.common("keras", "predicted")
    chief = found.results[0]["keras"]
    assert np.isclose(chief["saved"], predicted, rtol=1e-5, atol=1e-3)
    assert np.isclose(chief["restored"], predicted, rtol=1e-5, atol=1e-3)
    found.common("keras", "weights_sha256")
    assert np.abs(found.common("keras", "statistics")).max() > 0.1
    assert found.common("keras", "iterations") == steps
    for history in found.each("keras", "history"):
        assert len(history["val_loss"]) == len(history["accuracy"]) == 6
        assert history["val_loss"][-1] < history["val_loss"][0]
    # Worker 1 has ended its second fit after an epoch; the others go on.
    assert found.each("keras", "epochs") == [3, 1, 3][: len(found.results)]
    for looks in found.each("keras", "looks"):
        assert looks and all(looks)
    assert found.common("keras", "evaluated_again")["accuracy"] > 0.65
    # With a learning rate of 0 what was written stays, and statistics go on from it.
    assert found.common("keras", "written")["unchanged"]
    assert np.abs(np.array(found.common("keras", "written", "statistics")) - 0.25).max() > 0.01


def check_loops(found: JobResult) -> None:
    """Checks custom loops."""
    for name in ("run_in_function", "eager"):
        found.common("loops", name, "weights_sha256")
        # They begin with the model of one of them.
        before = max(found.each("loops", name, "before"))
        for loop in found.each("loops", name):
            # How far they come in so few steps depends on who meets whom.
            assert loop["after"] < before
            # A step that trains nothing sees what all have come to, when it is called.
            assert abs(loop["tested"] - loop["after"]) < abs(loop["tested"] - loop["before"])
            assert loop["steps"] == 2 * 480 // 16 // len(found.results)


def check_memory(found: JobResult, services: int) -> None:
    """Checks that services keep the centre once, and what may be on its way to and from workers."""
    window = 2 * 16 * 2**20
    for memory in found.each("memory"):
        model_bytes = memory["model_bytes"]
        besides = len(found.results) * services * window
        assert 0.9 * model_bytes < memory["kept_bytes"] <= 1.2 * model_bytes + besides
        # The first service's part of it.
        assert 0.9 * model_bytes < services * memory["centre_bytes"] < 1.1 * model_bytes


def check_nobody_waited(found: JobResult) -> None:
    """Checks that only the slow worker was slow: the others were done before its half."""
    runs = found.each("straggler", "runs")
    slow = runs.pop(1)
    assert runs == [30] * len(runs)
    assert slow < 15
