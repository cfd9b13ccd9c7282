"""When a fit stops before its time: on every worker after the same run."""

from collections.abc import Callable

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.session import Session


class Stopping:
    """Turns the wish of one worker that training stops into a stop of all, at the same run.

    A callback may set `stop_training` on any worker. During an epoch the wish travels ahead of the
    worker's next run and the service answers with a run that nobody can have passed. After an
    epoch workers ask one another, so that those that decide alike stop there and then.

    Args:
        session: The connection to the service.
        runs: Returns how many runs this worker has done.
    """

    def __init__(self, session: Session, runs: Callable[[], int]) -> None:
        self._session = session
        self._runs = runs
        self._fit = 0
        self._asked_at = 0
        self._forget()

    @property
    def fit(self) -> int:
        """How many fits have begun; every worker counts alike."""
        return self._fit

    @property
    def stopped(self) -> bool:
        """Whether the fit in progress is to stop now."""
        if self._agreed:
            return True
        run = self._session.stop_at(self._fit)
        return run is not None and self._runs() >= run

    def begin_fit(self) -> None:
        """Takes note that a fit begins."""
        self._fit += 1
        self._forget()

    def wish(self, stops: bool) -> None:
        """Takes note of what this worker's callbacks want."""
        self._wished = bool(stops)

    def before_run(self) -> None:
        """Tells the service of a wish."""
        if self._wished and not self._told:
            self._told = True
            self._session.wish_stop(self._fit, self._runs())

    def after_epoch(self) -> None:
        """Asks the other workers whether one of them wants to stop here."""
        run = self._runs()
        if run == self._asked_at:
            # Nothing was trained, so there is nothing to have in common.
            self._agreed = self._wished
            return
        self._asked_at = run
        wished = self._wished or self._session.stop_at(self._fit) is not None
        self._agreed = self._session.gather(pb.STOP, run, run, stop=wished).stop

    def _forget(self) -> None:
        self._wished = self._told = self._agreed = False
