"""How a worker's part in a job begins and ends."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from tf_syncdist.cluster.child import ChildAggregator
from tf_syncdist.cluster.interrupts import InterruptWatcher, exit_now
from tf_syncdist.cluster.roles import ClusterRole
from tf_syncdist.cluster.supervision import SupervisedAggregator
from tf_syncdist.errors import SyncDistError
from tf_syncdist.observability.reports import CutoffReport, Report, WorkerReport
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.session import Session, SessionConfig

# How long a worker that is done stays for those that are behind it (rule 9 of docs/semantics.md).
# Worker 0 stays longer where the service is its child, since the others cannot do without it.
_STAY_SECONDS = 60.0

_log = logging.getLogger("tf_syncdist")


def say(text: str) -> None:
    """Prints a line for the user on stderr."""
    print(f"tf_syncdist: {text}", file=sys.stderr, flush=True)


def cutoff_report(reply: pb.ReportReply) -> CutoffReport | None:
    """Returns what a report says of the cutoff policy, if that chooses."""
    if not reply.HasField("cutoff"):
        return None
    told = reply.cutoff
    return CutoffReport(
        told.policy,
        told.rounds,
        told.mean_count,
        told.least,
        told.most,
        told.closed_seconds,
        told.expected_seconds if told.HasField("expected_seconds") else None,
        told.reason,
        told.failure,
    )


class Interrupted(SyncDistError, StopIteration):
    """A wait was ended because the program is to end.

    TensorFlow writes no warning with a traceback for a StopIteration out of its graph. Nobody is
    to see this error: the main thread raises the signal's own exception in its place.
    """


class Controller(Protocol):
    """What a membership asks of the runs of its worker."""

    run: int
    error: BaseException | None

    def settle(self) -> None:
        """Makes an update that waits, if there is one."""
        ...

    def answer_state_requests(self) -> None:
        """Gives this worker's state to those that have asked for it."""
        ...


class Membership:
    """Connects a worker to its job, starting the service where that is this worker's duty.

    Args:
        role: What this process is.
        config: What it tells the service.
        print_report: Whether worker 0 prints the job's report at the end.
        record_trace: Where the service that this worker starts records how long workers take.
    """

    def __init__(
        self,
        role: ClusterRole,
        config: SessionConfig,
        print_report: bool,
        record_trace: str = "",
    ) -> None:
        self.role = role
        self._record_trace = record_trace
        self._starts = 0
        self._config = config
        self.failed = False
        self._print_report = print_report and role.task_index == 0
        self._controller: Controller | None = None
        self._final_report: Callable[[], object] = self.report
        self._on_close: Callable[[], None] = lambda: None
        self._on_interrupt: Callable[[], None] = lambda: None
        self._closed = False
        self._child: SupervisedAggregator | None = None
        self._goodbye = threading.Lock()
        self._interrupts = InterruptWatcher(self._interrupted)
        try:
            if not role.aggregators and role.task_index == 0:
                self._child = SupervisedAggregator(self._start_child, say)
            # What the service has to tell concerns everybody; one worker prints it.
            self.session = Session(config, say if role.task_index == 0 else _log.info)
        except BaseException:
            if self._child is not None:
                self._child.close()
            self._interrupts.close()
            raise
        atexit.register(self._close_at_exit)

    def _start_child(self) -> ChildAggregator:
        credentials = self._config.credentials
        trace = self._record_trace
        if trace and self._starts:
            # What the former process has written stays.
            root, extension = os.path.splitext(trace)
            trace = f"{root}.{self._starts}{extension}"
        self._starts += 1
        return ChildAggregator(
            self.role.address,
            credentials.insecure,
            self._config.connect_timeout_seconds,
            tls=credentials.uses_tls,
            variables=credentials.variables(),
            record_trace=trace,
        )

    @property
    def interrupted(self) -> signal.Signals | None:
        """The signal that is to end this program, if one has come."""
        return self._interrupts.received

    @property
    def is_closed(self) -> bool:
        """Whether this worker has left the job."""
        return self._closed

    def attach(
        self,
        controller: Controller,
        report: Callable[[], object] | None = None,
        on_close: Callable[[], None] = lambda: None,
        on_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """Names the controller whose runs this membership is about.

        Args:
            controller: It.
            report: Returns what is printed at the end; by default the counts of rounds.
            on_close: Called when this worker has left the job.
            on_interrupt: Called on another thread when a signal is to end the program; it ends
                waits that are not the session's.
        """
        self._on_interrupt = on_interrupt
        self._on_close = on_close
        self._controller = controller
        self._final_report = report or self.report

    def _interrupted(self, number: signal.Signals) -> None:
        session: Session | None = getattr(self, "session", None)
        if session is None:
            # The main thread is still connecting, where it can be interrupted.
            return
        if number == signal.SIGTERM:
            # A warning, most often: the machine is needed for something else.
            self._say_goodbye(pb.PREEMPTED)
        session.cancel(Interrupted(f"The training step was interrupted by {number.name}."))
        self._on_interrupt()

    def _say_goodbye(self, reason: int) -> None:
        """Says goodbye, once."""
        if self._goodbye.acquire(blocking=False):
            run = self._controller.run if self._controller is not None else 0
            self.session.goodbye(reason, run)

    def report(self) -> Report:
        """Returns the counts of the job so far."""
        reply = self.session.report()
        return Report(
            reply.rounds,
            tuple(
                WorkerReport(
                    w.worker,
                    w.contributed,
                    w.late,
                    w.partly_used,
                    w.replayed,
                    w.missed,
                    w.mean_delay_seconds,
                    w.nonfinite,
                )
                for w in reply.workers
            ),
            dict(reply.refused),
            cutoff_report(reply),
        )

    def close(self) -> None:
        """Says goodbye, stays for workers that are behind, and reports. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        try:
            controller = self._controller
            failed = self.failed or controller is None or controller.error is not None
            failed = failed or getattr(sys, "last_value", None) is not None
            if not failed and self.interrupted is None:
                controller.settle()
            run = controller.run if controller is not None else 0
            preempted = self.interrupted is signal.SIGTERM
            failed = failed or preempted
            self._say_goodbye(pb.PREEMPTED if preempted else pb.FAILED if failed else pb.FINISHED)
            if not failed:
                seconds = _STAY_SECONDS
                if self._child is not None:
                    seconds = max(seconds, self.session.config.timeout_seconds)
                gone = self.session.wait_all_gone(seconds, controller.answer_state_requests)
                if not gone and not self.session.has_failed:
                    say(f"some workers were not done {seconds:g} s after this one")
                if self._print_report and run:
                    print(self._final_report(), flush=True)
        except Exception as e:  # noqa: BLE001 - the program is over; this must not hide its result
            _log.debug("while leaving the job: %s", e)
        finally:
            self._interrupts.close()
            self._on_close()
            self.session.close()
            if self._child is not None:
                self._child.close()

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except (KeyboardInterrupt, SystemExit):
            # Python would print what is raised here, and end with the status it had before.
            exit_now(self.interrupted or signal.SIGINT)
