"""Starts the tasks of a job on this machine and looks after them until they have ended."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from tf_syncdist.cluster.arguments import check_arguments
from tf_syncdist.cluster.environment import shared_environment, tf_config
from tf_syncdist.cluster.escalation import Escalation
from tf_syncdist.cluster.guard import OrphanGuard
from tf_syncdist.cluster.ports import ReservedPort, reserve_ports
from tf_syncdist.cluster.relay import Relay
from tf_syncdist.cluster.restarts import Restarts
from tf_syncdist.cluster.task import Task, signal_name

_POLL_SECONDS = 0.02
_KILL_SECONDS = 5.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(
    command: Sequence[str],
    num_workers: int,
    num_ps: int = 0,
    *,
    grace_seconds: float = 5.0,
    stop_on_failure: bool = False,
    max_restarts: int = 0,
    filter_tf_startup: bool = True,
) -> int:
    """Runs a job on this machine and waits for its end.

    Signals are passed on to the tasks if this is called from the main thread.

    Args:
        command: A script and its arguments, or `-m`, a module and its arguments.
        num_workers: How many processes run the command.
        num_ps: How many aggregation services are started beside them.
        grace_seconds: How long a task that was asked to end may take before it is asked more
            firmly. Raise it if workers need longer than that to save a checkpoint.
        stop_on_failure: Whether to stop all tasks when one has failed.
        max_restarts: How often each task that has failed is started again. Then it is a failure.
        filter_tf_startup: Whether to drop TensorFlow's C++ start-up chatter.

    Returns:
        The exit status for the launcher: 0 if all tasks succeeded in the end, that of the task that
        failed first, or 128 plus the signal that stopped the job.

    Raises:
        LaunchError: If no job can be started with these arguments.
        OSError: If there are no free ports, or no room for another process.
    """
    check_arguments(command, num_workers, num_ps, grace_seconds, max_restarts)
    env, warning = shared_environment(os.environ)
    with reserve_ports(num_workers + num_ps) as ports:
        tasks = _make_tasks(command, env, ports[:num_workers], ports[num_workers:])
        with Relay(filter_tf_startup) as relay, OrphanGuard() as guard:
            if warning:
                relay.say(f"warning: {warning}")
            restarts = Restarts(max_restarts)
            return Job(tasks, relay, guard, grace_seconds, stop_on_failure, restarts).run()


def _make_tasks(
    command: Sequence[str],
    env: dict[str, str],
    worker_ports: Sequence[ReservedPort],
    ps_ports: Sequence[ReservedPort],
) -> list[Task]:
    tasks = []
    for task_type, ports in (("worker", worker_ports), ("ps", ps_ports)):
        for index, port in enumerate(ports):
            config = tf_config(
                task_type, index, [p.port for p in worker_ports], [p.port for p in ps_ports]
            )
            arguments = (
                list(command)
                if task_type == "worker"
                else ["-m", "tf_syncdist.aggregator", f"--port={port.port}"]
            )
            tasks.append(
                Task(
                    task_type,
                    index,
                    [sys.executable, *arguments],
                    {**env, "TF_CONFIG": config},
                    port,
                )
            )
    return tasks


class Job:
    """The running tasks, and what is done when one ends or a signal arrives.

    Args:
        tasks: The tasks, not started yet.
        relay: What passes their output on.
        guard: What kills them if this process is gone.
        grace_seconds: As for `launch`.
        stop_on_failure: As for `launch`.
        restarts: Decides which failed tasks are started again; by default none.
        clock: Returns a time in seconds.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        relay: Relay,
        guard: OrphanGuard,
        grace_seconds: float,
        stop_on_failure: bool,
        restarts: Restarts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks = list(tasks)
        self._relay = relay
        self._guard = guard
        self._grace_seconds = grace_seconds
        self._stop_on_failure = stop_on_failure
        self._restarts = restarts or Restarts(0)
        self._clock = clock
        self._sleep = threading.Event().wait
        self._received: list[int] = []
        self._stopped_by: int | None = None
        self._first_failed: Task | None = None
        self._stop: Escalation | None = None
        self._ps_stop: Escalation | None = None

    def run(self) -> int:
        """Starts the tasks and waits until they have ended and their output is passed on.

        Returns:
            The exit status for the launcher.

        Raises:
            OSError: If the machine has no room for another process.
            RuntimeError: If the output of the tasks cannot be read any more.
        """
        with self._collect_signals():
            try:
                for task in self._tasks:
                    self._start(task)
                while self._restarts.waiting or any(task.running for task in self._tasks):
                    self._step()
                    self._sleep(_POLL_SECONDS)
            finally:
                self._kill_rest()
            status = self._conclude()
            self._relay.finish()
            self._drain()
        return status

    def _step(self) -> None:
        self._take_signals()
        for task in self._tasks:
            if task.poll(self._guard, self._relay):
                self._task_ended(task)
        now = self._clock()
        for task in self._restarts.start_due(now, self._start):
            self._restart_services(task)
        for escalation in (self._stop, self._ps_stop):
            if escalation is not None and escalation.due(now):
                self._say(escalation.advance(now))

    def _task_ended(self, task: Task) -> None:
        """Decides what follows from the end of a task."""
        if task.failed:
            goes_on = self._stop is None and (task.task_type == "worker" or self._has_workers)
            plan = self._restarts.plan(task, self._clock()) if goes_on else ""
            self._say("; ".join(filter(None, (task.describe_end(), plan))))
            if plan:
                return
            self._first_failed = self._first_failed or task
            if self._stop_on_failure and self._stop is None:
                self._stop = Escalation(
                    self._tasks, (signal.SIGTERM, signal.SIGKILL), self._grace_seconds, 0.0
                )
                self._restarts.cancel()
        if self._ps_stop is None and not self._has_workers:
            self._ps_stop = Escalation(
                [other for other in self._tasks if other.task_type == "ps"],
                (signal.SIGTERM, signal.SIGKILL),
                self._grace_seconds,
                self._clock() + self._grace_seconds,
            )

    @property
    def _has_workers(self) -> bool:
        """Whether a worker runs or is going to be started again."""
        return any(
            task.running or task in self._restarts.waiting
            for task in self._tasks
            if task.task_type == "worker"
        )

    def _start(self, task: Task) -> None:
        task.start(self._guard, self._relay)

    def _restart_services(self, task: Task) -> None:
        """Starts services again that ended in order, because all workers seemed to be gone."""
        others = [other for other in self._tasks if other.task_type == "worker"]
        if task.task_type != "worker" or any(other.returncode == 0 for other in others):
            return
        for service in self._tasks:
            if service.task_type == "ps" and service.returncode == 0:
                self._say(f"starting {service.name} again for {task.name}")
                self._start(service)

    def _take_signals(self) -> None:
        if self._relay.finished:
            raise RuntimeError("The thread that passes output on has died; its error is above.")
        if self._relay.error is not None and self._stopped_by is None:
            # Like other programs in a shell's pipeline. SIGPIPE itself would not stop Python.
            self._stop_all(signal.SIGPIPE, signal.SIGTERM)
            self._say(f"stopping, as the output cannot be written: {self._relay.error}")
        # Taken as a set: one Ctrl-C may arrive twice at once, from a terminal and from a wrapper.
        received, self._received = set(self._received), []
        for signum in received:
            if self._stop is None or self._stopped_by is None:
                self._stop_all(signum, signum)
            else:
                self._say(self._stop.advance(self._clock()))

    def _stop_all(self, reason: int, first: int) -> None:
        self._stopped_by = reason
        self._restarts.cancel()
        self._stop = Escalation(
            self._tasks, (first, signal.SIGTERM, signal.SIGKILL), self._grace_seconds, 0.0
        )
        self._say(self._stop.advance(self._clock()))

    def _conclude(self) -> int:
        if self._stopped_by is not None:
            self._say(f"job was stopped by {signal_name(self._stopped_by)}")
            return 128 + self._stopped_by
        if self._first_failed is not None:
            self._say(f"job failed: {self._first_failed.describe_end()}")
            return self._first_failed.exit_status
        return 0

    def _drain(self) -> None:
        """Waits for the output's reader as long as nobody wants to stop, as any program does."""
        give_up_at = self._clock() + self._grace_seconds if self._stopped_by is not None else None
        while not self._relay.finished:
            if self._received and give_up_at is None:
                give_up_at = self._clock() + self._grace_seconds
            if give_up_at is not None and self._clock() >= give_up_at:
                return
            self._sleep(_POLL_SECONDS)

    def _kill_rest(self) -> None:
        """Leaves nothing behind, even if an error in the launcher ends the job."""
        give_up_at = self._clock() + _KILL_SECONDS
        while any(task.running for task in self._tasks) and self._clock() < give_up_at:
            for task in self._tasks:
                task.send_signal(signal.SIGKILL)
                task.poll(self._guard, self._relay)
            self._sleep(_POLL_SECONDS)

    def _say(self, message: str) -> None:
        if message:
            self._relay.say(message)

    @contextlib.contextmanager
    def _collect_signals(self) -> Iterator[None]:
        """Notes signals instead of acting on them, which only the loop does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(signum: int, frame: FrameType | None) -> None:
            self._received.append(signum)

        previous = {
            signum: signal.signal(signum, note)
            for signum in _STOP_SIGNALS
            # Under nohup, the end of the terminal is to be ignored.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
