"""How a worker's part in a job begins and ends."""

import atexit
import logging
import signal
import sys

from tf_syncdist.cluster.child import ChildAggregator
from tf_syncdist.cluster.interrupts import InterruptWatcher
from tf_syncdist.cluster.roles import ClusterRole
from tf_syncdist.cluster.supervision import SupervisedAggregator
from tf_syncdist.errors import SyncDistError
from tf_syncdist.observability.reports import Report, WorkerReport
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies.controller import RunController
from tf_syncdist.transport.session import Session, SessionConfig

# How long a worker that is done stays for those that are behind it (rule 9 of docs/semantics.md).
# Worker 0 stays longer where the service is its child, since the others cannot do without it.
_STAY_SECONDS = 60.0

_log = logging.getLogger("tf_syncdist")


def say(text: str) -> None:
    """Prints a line for the user on stderr."""
    print(f"tf_syncdist: {text}", file=sys.stderr, flush=True)


class Membership:
    """Connects a worker to its job, starting the service where that is this worker's duty.

    Args:
        role: What this process is.
        config: What it tells the service.
        insecure: Whether the service may listen beyond loopback without TLS.
        print_report: Whether worker 0 prints the job's report at the end.
    """

    def __init__(
        self,
        role: ClusterRole,
        config: SessionConfig,
        insecure: bool,
        print_report: bool,
    ) -> None:
        self.role = role
        self.failed = False
        self.interrupted: signal.Signals | None = None
        self._print_report = print_report and role.task_index == 0
        self._controller: RunController | None = None
        self._closed = False
        self._child: SupervisedAggregator | None = None
        if not role.aggregators and role.task_index == 0:
            self._child = SupervisedAggregator(
                lambda: ChildAggregator(role.address, insecure, config.connect_timeout_seconds), say
            )
        try:
            # What the service has to tell concerns everybody; one worker prints it.
            self.session = Session(config, say if role.task_index == 0 else _log.info)
        except BaseException:
            if self._child is not None:
                self._child.close()
            raise
        self._interrupts = InterruptWatcher(self._interrupted)
        atexit.register(self.close)

    @property
    def is_closed(self) -> bool:
        """Whether this worker has left the job."""
        return self._closed

    def attach(self, controller: RunController) -> None:
        """Names the controller whose runs this membership is about."""
        self._controller = controller

    def _interrupted(self, number: signal.Signals) -> None:
        self.interrupted = number
        self.session.cancel(SyncDistError(f"The training step was interrupted by {number.name}."))

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
        )

    def close(self) -> None:
        """Says goodbye, stays for workers that are behind, and reports. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            controller = self._controller
            failed = self.failed or controller is None or controller.error is not None
            failed = failed or getattr(sys, "last_value", None) is not None
            run = controller.run if controller is not None else 0
            self.session.goodbye(pb.FAILED if failed else pb.FINISHED, run)
            if not failed:
                seconds = _STAY_SECONDS
                if self._child is not None:
                    seconds = max(seconds, self.session.config.timeout_seconds)
                gone = self.session.wait_all_gone(seconds, controller.answer_state_requests)
                if not gone and not self.session.has_failed:
                    say(f"some workers were not done {seconds:g} s after this one")
                if self._print_report and run:
                    print(self.report(), flush=True)
        except Exception as e:  # noqa: BLE001 - the program is over; this must not hide its result
            _log.debug("while leaving the job: %s", e)
        finally:
            self._interrupts.close()
            self.session.close()
            if self._child is not None:
                self._child.close()
