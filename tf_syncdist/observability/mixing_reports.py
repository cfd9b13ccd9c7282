"""Reports of strategies that mix models."""

from typing import NamedTuple

from tf_syncdist.observability.reports import Report


class Exchanges(NamedTuple):
    """What one worker has counted.

    Args:
        exchanges: How often it was to mix its model with others.
        mixed: How many times that has happened; with gossip, with how many models of others.
        with_itself: How often it has drawn itself as its partner.
        failed: How often its partner did not answer.
        too_stale: How often some of its values were left out because they were too stale.
        staleness_sum: How many other exchanges there were at the centre between reading it and
            mixing with it, summed up; with gossip by how many steps what it pulled differed from
            its own.
        staleness_max: The most of that.
    """

    exchanges: int = 0
    mixed: int = 0
    with_itself: int = 0
    failed: int = 0
    too_stale: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0

    @property
    def mean_staleness(self) -> float:
        """Mean staleness of what was mixed."""
        return self.staleness_sum / max(1, self.mixed)


class MixingReport(NamedTuple):
    """What has become of models that are mixed.

    Args:
        worker: The worker that reports.
        num_workers: How many workers the job has.
        runs: How many runs this worker has done.
        own: What this worker has counted.
        workers: For every worker, what the service has counted; empty where models do not pass
            through it. It counts from its last start, by the first slice of the centre.
        distance: The root mean square of the differences between this worker's model and the
            centre, or the mean of all models, when it was looked at last; `None` if it never was.
            With model averaging, between all its learners and the central model.
        centre_bytes: How many bytes the first process of the service holds for the centre.
        learners: With model averaging, how far each learner of this worker is from the central
            model, in lengths of that.
        rounds: With model averaging, in which every run waits for all workers, who was in time.
    """

    worker: int
    num_workers: int
    runs: int
    own: Exchanges
    workers: tuple[Exchanges, ...] = ()
    distance: float | None = None
    centre_bytes: int = 0
    learners: tuple[float, ...] = ()
    rounds: Report | None = None

    def __str__(self) -> str:
        if self.learners:
            return self._of_learners()
        if self.num_workers == 1:
            return f"{self.runs} runs by a single worker"
        lines = [
            f"worker {self.worker} of {self.num_workers} has done {self.runs} runs: "
            + _line(self.own)
        ]
        lines += [
            f"worker {number} at the centre: {_line(counts)}"
            for number, counts in enumerate(self.workers)
        ]
        if self.distance is not None:
            lines.append(
                f"root mean square distance of worker {self.worker}'s model to that of all: "
                f"{self.distance:.3g}"
            )
        return "\n".join(lines)

    def _of_learners(self) -> str:
        count = len(self.learners)
        who = "a single worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        each = " each" if self.num_workers > 1 else ""
        said = f"{self.runs} runs by {who} with {count} learner{'s' * (count > 1)}{each}"
        if self.num_workers * count == 1:
            return said
        mixed = "all" if self.own.mixed == self.runs else str(self.own.mixed)
        lines = [f"{said}, averaged in {mixed} of them without staleness"]
        if self.num_workers > 1 and self.rounds is not None:
            lines.append(str(self.rounds))
        least, most = min(self.learners), max(self.learners)
        lines.append(
            f"learners of worker {self.worker} are {least:.3g} to {most:.3g} of the central "
            "model's length away from it"
        )
        return "\n".join(lines)


def averaging_report(
    worker: int,
    num_workers: int,
    runs: int,
    averaged: int,
    distance: float | None,
    learners: tuple[float, ...],
    rounds: Report,
) -> MixingReport:
    """Returns the report of a job in which every run waits for the learners of all workers.

    Args:
        worker: The worker that reports.
        num_workers: How many workers the job has.
        runs: How many runs this worker has done.
        averaged: In how many runs learners were averaged.
        distance: See `MixingReport`.
        learners: See `MixingReport`.
        rounds: See `MixingReport`.
    """
    workers = tuple(Exchanges(rounds.rounds, w.contributed) for w in rounds.workers)
    own = Exchanges(averaged, averaged)
    return MixingReport(worker, num_workers, runs, own, workers, distance, 0, learners, rounds)


def _line(counts: Exchanges) -> str:
    parts = [f"{counts.exchanges} exchanges"] if counts.exchanges else []
    parts.append(
        f"{counts.mixed} mixed, staleness {counts.mean_staleness:.1f} on average and "
        f"{counts.staleness_max} at most"
    )
    if counts.with_itself:
        parts.append(f"{counts.with_itself} with itself")
    if counts.failed:
        parts.append(f"{counts.failed} without an answer")
    if counts.too_stale:
        parts.append(f"{counts.too_stale} left out as too stale")
    return ", ".join(parts)
