"""The report of a job: for every worker, how often it was in time."""

import statistics
import types
from collections.abc import Mapping
from typing import NamedTuple


class WorkerReport(NamedTuple):
    """Counts of one worker.

    Args:
        worker: Index of the worker.
        contributed: Rounds whose every slice has its values.
        late: Rounds for which it computed, and at least one slice was closed without it.
        partly_used: Late rounds that have its values in some slices.
        replayed: Rounds whose result it applied without computing (missed ones included).
        missed: Rounds that it skipped by taking over another worker's state.
        mean_delay_seconds: Mean delay of its arrival behind the first worker's, over the rounds
            for which it computed.
        nonfinite: Rounds from which it kept its values back, because some were not finite.
    """

    worker: int
    contributed: int
    late: int
    partly_used: int
    replayed: int
    missed: int
    mean_delay_seconds: float
    nonfinite: int = 0


class CutoffReport(NamedTuple):
    """What a cutoff policy has chosen lately.

    Args:
        policy: The policy.
        rounds: Over how many of the last rounds the numbers are; with 0 they mean nothing.
        mean_count: Mean number of contributions with which they were closed.
        least: The least of them.
        most: The most of them.
        closed_seconds: How long the rounds were; the median.
        expected_seconds: How long the policy expected them to be, if it has said; the median.
        reason: Why the last plan was made, or the last slice was closed.
        failure: Why full sync has taken its place; empty if it has not.
    """

    policy: str
    rounds: int
    mean_count: float
    least: int
    most: int
    closed_seconds: float
    expected_seconds: float | None
    reason: str
    failure: str

    def describe(self, num_workers: int) -> str:
        """Returns all of it as a line."""
        if not self.rounds:
            line = f"{self.policy} has not closed a round yet"
        else:
            line = (
                f"{self.policy} closed the last {self.rounds} rounds with {self.least} to "
                f"{self.most} of {num_workers} contributions (mean {self.mean_count:.1f}), after "
                f"{self.closed_seconds:.3g} s"
            )
            if self.expected_seconds is not None:
                line += f" where {self.expected_seconds:.3g} s were expected"
            if self.reason:
                line += f"; {self.reason}"
        return f"{line}; then full sync, because {self.failure}" if self.failure else line


class Report(NamedTuple):
    """Counts of a job.

    Args:
        rounds: Rounds that are over.
        workers: One entry per worker, in order.
        refused: How often the first process of the service has refused a call, a stream or a
            message, by the reason in words.
        cutoff: What the cutoff policy has chosen; `None` if it always waits for the same number.
    """

    rounds: int
    workers: tuple[WorkerReport, ...]
    refused: Mapping[str, int] = types.MappingProxyType({})
    cutoff: CutoffReport | None = None

    def __str__(self) -> str:
        if not self.workers:
            return f"{self.rounds} rounds by a single worker"
        lines = [f"{self.rounds} rounds with {len(self.workers)} workers"]
        median = statistics.median(w.mean_delay_seconds for w in self.workers)
        for w in self.workers:
            behind = (w.mean_delay_seconds - median) * 1000
            if w.late or w.replayed:
                missed = w.late + w.replayed
                line = f"worker {w.worker} was late in {missed} of {self.rounds} rounds"
                if w.replayed:
                    line += f" ({w.replayed} of them replayed without computing)"
            elif w.contributed == self.rounds:
                line = f"worker {w.worker} was in time in all {self.rounds} rounds"
            else:
                line = f"worker {w.worker} was in time in {w.contributed} of {self.rounds} rounds"
            absent = self.rounds - w.contributed - w.late - w.replayed
            if absent > 0:
                line += f" and absent from {absent}"
            if w.nonfinite:
                line += f", kept back gradients with NaN or Inf in {w.nonfinite}"
            where = "behind" if behind > 0 else "ahead of"
            delay = "at" if abs(behind) < 0.5 else f"{abs(behind):.0f} ms {where}"
            lines.append(f"{line}, {delay} the median")
        if self.cutoff is not None:
            lines.append(self.cutoff.describe(len(self.workers)))
        if self.refused:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in sorted(self.refused.items()))
            lines.append(f"the service refused {sum(self.refused.values())} times: {reasons}")
        return "\n".join(lines)
