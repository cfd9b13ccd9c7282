"""What a worker's runs leave on its timeline: when it computed and when it applied results."""

import time

from tf_syncdist.observability.timeline import Timeline
from tf_syncdist.propagation.slices import Bucket


class RunTimeline:
    """Records when a worker computed, and when it applied which results.

    TensorFlow does not tell when an update is over. It is taken to end when the next bucket is
    asked for, or the run.

    Args:
        timeline: Where it is recorded; `None` for nowhere.
    """

    def __init__(self, timeline: Timeline | None) -> None:
        self._timeline = timeline
        self._run = 0
        self._begun_at = 0.0
        self._applying: tuple[int, int, float] | None = None

    def begin(self, run: int) -> None:
        """Takes note that a run begins."""
        self._run, self._begun_at = run, time.monotonic()

    def computed(self) -> None:
        """Takes note that all gradients of the run are there."""
        if self._timeline is not None:
            args = {"run": self._run}
            now = time.monotonic()
            self._timeline.record(f"run {self._run}", "compute", self._begun_at, now, args=args)

    def applies(self, run: int, bucket: Bucket | None = None) -> None:
        """Takes note that results are being applied: of a bucket, or of a whole exchange."""
        self.applied()
        if self._timeline is not None:
            priority = bucket.slices[0].priority if bucket is not None and bucket.slices else 0
            self._applying = (run, priority, time.monotonic())

    def applied(self) -> None:
        """Takes note that what was being applied is."""
        if self._applying is not None:
            (run, priority, began), self._applying = self._applying, None
            args = {"run": run, "priority": priority}
            self._timeline.record(f"update {run}", "apply", began, time.monotonic(), args=args)
