"""One process of a job on this machine."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from tf_syncdist.cluster.guard import OrphanGuard
from tf_syncdist.cluster.ports import ReservedPort
from tf_syncdist.cluster.relay import Relay

_REAP_SECONDS = 5.0

RESTARTS_VARIABLE = "TF_SYNCDIST_RESTARTS"
"""Environment variable that tells a task how often it has been started again."""


class Task:
    """A process of a job, together with what it has started itself.

    It leads a session and process group of its own. A terminal's Ctrl-C therefore reaches it
    through the launcher only, and a signal to the group reaches all of it. When the process ends,
    what is left of its group is killed, as in a container.

    Args:
        task_type: `"worker"` or `"ps"`.
        index: Which of its type the task is.
        command: The program and its arguments.
        env: All environment variables.
        port: Where the task is going to listen.
    """

    def __init__(
        self,
        task_type: str,
        index: int,
        command: Sequence[str],
        env: Mapping[str, str],
        port: ReservedPort,
    ) -> None:
        self.task_type = task_type
        self.name = f"{task_type} {index}"
        self.returncode: int | None = None
        """Exit code, or minus the signal that killed it; None before its end."""
        self.signalled = False
        """Whether the launcher has sent it a signal, so that its end is no failure."""
        self.restarts = 0
        """How often it has been started again."""
        self._command = list(command)
        self._env = dict(env)
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it has been started and not been seen to end."""
        return self._process is not None and self.returncode is None

    @property
    def failed(self) -> bool:
        """Whether it has ended in another way than it should."""
        return bool(self.returncode) and not self.signalled

    @property
    def exit_status(self) -> int:
        """How a shell would put its end: the exit code, or 128 plus the signal."""
        code = self.returncode or 0
        return code if code >= 0 else 128 - code

    def describe_end(self) -> str:
        """Says how it ended.

        Returns:
            A sentence without its full stop, such as `worker 1 failed with exit code 3`.
        """
        code = self.returncode or 0
        if code >= 0:
            return f"{self.name} failed with exit code {code}"
        return f"{self.name} was killed by {signal_name(-code)}"

    def start(self, guard: OrphanGuard, relay: Relay) -> None:
        """Starts the process, or starts it again after its end.

        Args:
            guard: What kills it if the launcher is gone.
            relay: What passes its output on.

        Raises:
            OSError: If the machine has no room for another process.
        """
        self.returncode, self.signalled = None, False
        out, err = relay.open(self.name)
        try:
            self._port.release()
            env = {**self._env, RESTARTS_VARIABLE: str(self.restarts)}
            self._process = guard.start(self._command, env, out, err)
        finally:
            os.close(out)
            os.close(err)

    def poll(self, guard: OrphanGuard, relay: Relay) -> bool:
        """Looks, without waiting, whether it has just ended, and clears up after it.

        Args:
            guard: As given to `start`.
            relay: As given to `start`.

        Returns:
            Whether this call is the one that saw its end.
        """
        if not self.running or not self._is_over():
            return False
        assert self._process is not None
        # All this while its id still belongs to it, that is before it is waited for.
        self.send_signal(signal.SIGKILL)
        guard.forget(self._process.pid)
        self.returncode = self._process.wait(_REAP_SECONDS)
        relay.task_ended(self.name)
        return True

    def send_signal(self, signum: int) -> None:
        """Sends a signal to its process group; does nothing if it is not running.

        Args:
            signum: The signal.
        """
        if not self.running:
            return
        assert self._process is not None
        # PermissionError is how macOS says that all of a group has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signum)

    def _is_over(self) -> bool:
        assert self._process is not None
        if not hasattr(os, "waitid"):
            # Not on macOS before Python 3.13: there, its id is free a moment too early.
            return self._process.poll() is not None
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None


def signal_name(signum: int) -> str:
    """Names a signal.

    Args:
        signum: The signal, which need not be one that Python knows.

    Returns:
        A name such as `SIGTERM`, or `signal 34` where there is none.
    """
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
