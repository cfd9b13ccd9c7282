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


class Report(NamedTuple):
    """Counts of a job.

    Args:
        rounds: Rounds that are over.
        workers: One entry per worker, in order.
        refused: How often the first process of the service has refused a call, a stream or a
            message, by the reason in words.
    """

    rounds: int
    workers: tuple[WorkerReport, ...]
    refused: Mapping[str, int] = types.MappingProxyType({})

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
        if self.refused:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in sorted(self.refused.items()))
            lines.append(f"the service refused {sum(self.refused.values())} times: {reasons}")
        return "\n".join(lines)
