"""How many learners a device is given: as many as raise the throughput.

References:
    Koliousis et al.: CROSSBOW, arXiv 1901.02244, auto-tuning of learners per GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

GAIN = 0.10


class Trial(NamedTuple):
    """One number of learners that was tried.

    Args:
        learners: How many a device had.
        throughput: Examples per second.
        gain: By which share that was more than with one learner fewer; `None` for the first.
    """

    learners: int
    throughput: float
    gain: float | None


class Tuner(NamedTuple):
    """What is to be tried, and what was.

    Args:
        learners: How many learners a device is to have now.
        done: Whether that is the result.
        trials: What was tried, in order.
    """

    learners: int = 1
    done: bool = False
    trials: tuple[Trial, ...] = ()


def measured(tuner: Tuner, throughput: float, gain: float = GAIN, most: int = 2**31) -> Tuner:
    """Returns what follows from a measurement with the number of learners that was to be tried.

    Learners are added as long as each raises the throughput by more than `gain`. The first that
    does not is taken away again, and nothing is tried any more.

    Args:
        tuner: Before the measurement.
        throughput: Examples per second that were measured.
        gain: The smallest share that is worth a learner.
        most: The most learners that a device can have.
    """
    if tuner.done:
        return tuner
    before = tuner.trials[-1].throughput if tuner.trials else None
    found = None if before is None else throughput / before - 1
    trials = (*tuner.trials, Trial(tuner.learners, throughput, found))
    if found is not None and found <= gain:
        return Tuner(tuner.learners - 1, True, trials)
    if tuner.learners >= most:
        return Tuner(tuner.learners, True, trials)
    return Tuner(tuner.learners + 1, False, trials)


def agreed(tables: Sequence[Sequence[float]], gain: float = GAIN, most: int = 2**31) -> Tuner:
    """Returns how many learners a device of each worker is given, from what each has measured.

    Workers wait for one another in every run, so the slowest one sets the pace of all: the job's
    throughput is that worker's, times the workers. What not every worker has tried is not chosen.

    Args:
        tables: For each worker its examples per second with 1, 2, ... learners.
        gain: See `measured`.
        most: See `measured`.

    Example:

    >>> agreed([[100.0, 190.0, 200.0], [90.0, 120.0, 125.0]]).learners
    2
    """
    tuner = Tuner()
    common = [len(tables) * min(rates) for rates in zip(*tables, strict=False)]
    for throughput in common:
        tuner = measured(tuner, throughput, gain, most)
    if tuner.done:
        return tuner
    return Tuner(max(len(common), 1), True, tuner.trials)


def table(tuner: Tuner) -> str:
    """Returns what was tried, as lines for a user."""
    lines = ["learners  examples/s    gain"]
    for trial in tuner.trials:
        gain = "" if trial.gain is None else f"{100 * trial.gain:+.0f} %"
        kept = "  <- kept" if tuner.done and trial.learners == tuner.learners else ""
        lines.append(f"{trial.learners:8d}{trial.throughput:12.0f}{gain:>8}{kept}")
    return "\n".join(lines)
