"""Which failed tasks are started again, and when."""

from collections.abc import Callable, Collection

from tf_syncdist.cluster.task import Task

# The first pause; each further one of the same task is twice as long. A task that fails at once
# (a port not yet free, a file that another process is about to write) has some time to do better.
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0


class Restarts:
    """Decides about failed tasks; starting them is left to the caller.

    Args:
        max_restarts: How often each task is started again at most; 0 for never.
    """

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._due_at: dict[Task, float] = {}

    @property
    def waiting(self) -> Collection[Task]:
        """The tasks that are going to be started again."""
        return self._due_at.keys()

    def plan(self, task: Task, now: float) -> str:
        """Takes note that a task has failed.

        Args:
            task: The task.
            now: The time in seconds.

        Returns:
            What is going to be done about it, in words; empty if nothing is.
        """
        if task.restarts >= self._max_restarts:
            return ""
        pause = min(_FIRST_PAUSE_SECONDS * 2**task.restarts, _MAX_PAUSE_SECONDS)
        self._due_at[task] = now + pause
        return f"starting it again in {pause:g} s ({task.restarts + 1} of {self._max_restarts})"

    def start_due(self, now: float, start: Callable[[Task], None]) -> list[Task]:
        """Starts the tasks whose pause is over.

        Args:
            now: The time in seconds.
            start: Starts a task.

        Returns:
            The tasks that were started.
        """
        due = [task for task, at in self._due_at.items() if at <= now]
        for task in due:
            del self._due_at[task]
            task.restarts += 1
            start(task)
        return due

    def cancel(self) -> None:
        """Forgets what was planned: the job is to end."""
        self._due_at.clear()
