"""How tasks are asked to end: mildly first, then more firmly."""

from collections.abc import Sequence

from tf_syncdist.cluster.task import Task, signal_name


class Escalation:
    """Signals for some tasks, each sent when the one before has had its time.

    Args:
        tasks: The tasks that are to end.
        signals: What to send, mildest first.
        grace_seconds: How long to wait after each.
        start_at: When to send the first.
    """

    def __init__(
        self, tasks: Sequence[Task], signals: Sequence[int], grace_seconds: float, start_at: float
    ) -> None:
        self._tasks = tasks
        self._signals = list(signals)
        self._grace_seconds = grace_seconds
        self._next_at = start_at

    def due(self, now: float) -> bool:
        """Says whether it is time for the next signal.

        Args:
            now: The time in seconds.

        Returns:
            Whether there is another signal, and the one before has had its time.
        """
        return bool(self._signals) and now >= self._next_at

    def advance(self, now: float) -> str:
        """Sends the next signal to those tasks that still run, if there is one.

        Args:
            now: The time in seconds.

        Returns:
            What was sent to whom, in words; empty if nothing was sent.
        """
        running = [task for task in self._tasks if task.running]
        if not self._signals or not running:
            return ""
        signum = self._signals.pop(0)
        self._next_at = now + self._grace_seconds
        for task in running:
            task.signalled = True
            task.send_signal(signum)
        return f"sent {signal_name(signum)} to {', '.join(task.name for task in running)}"
