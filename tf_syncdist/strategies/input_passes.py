"""Which iteration over the input a worker's runs belong to, where that may end. No TensorFlow."""

import collections

from tf_syncdist.transport.session import Session


class InputPasses:
    """Knows of input that was read ahead, and of the pass that is being read.

    Args:
        session: The connection to the service.

    Attributes:
        may_end: Whether input of unknown length is being read. Where it ends is decided from what
            workers have finished, so no update waits for the next run then.
    """

    def __init__(self, session: Session) -> None:
        self.may_end = False
        self._session = session
        self._pass: int | None = None
        self._read_ahead: collections.deque[tuple[int, int]] = collections.deque()

    def begin_input(self, run: int) -> None:
        """Takes note that input is read anew; what was agreed about the last input has served."""
        self._read_ahead.clear()
        self.may_end = False
        if self._pass is not None and run > self._pass:
            self._session.leave_pass(self._pass)
            self._pass = None

    def begin_pass(self, run: int) -> int:
        """Returns the run with which input of unknown length begins; it is the name of the pass."""
        self._pass = run
        return run

    def has_read(self, input_pass: int, run: int) -> None:
        """Takes note that there is input for a run; where the pass ends may not be known yet."""
        self._read_ahead.append((input_pass, run))

    def is_past(self, now: int) -> bool:
        """Returns whether input for this run was read ahead of where it ends for all workers."""
        while self._read_ahead:
            input_pass, run = self._read_ahead[0]
            end = self._session.end_of(input_pass)
            past = end is not None and end <= now
            if past or run <= now:
                self._read_ahead.popleft()
            if past or run >= now:
                return past
        return False

    def leave_ended(self, now: int) -> None:
        """Takes note that this run is not one of the last input, if that has ended before it.

        Otherwise nobody would wait for the workers that had no more input for it.
        """
        if self._pass is not None:
            end = self._session.end_of(self._pass)
            if end is not None and end <= now:
                self.begin_input(now)
