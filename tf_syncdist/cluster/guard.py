"""Ties the life of tasks to that of their launcher, even if it is killed with SIGKILL."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from tf_syncdist.cluster import guard_process

_CLOSE_SECONDS = 5.0


class OrphanGuard:
    """Kills the tasks of a job when its launcher is gone.

    A watchdog process in a session of its own waits for the end of a pipe, of which the launcher
    holds the other end. On Linux the kernel is asked, too, to kill each task with the launcher;
    that does not reach what a task has started itself, which the watchdog does.

    Tasks must be started by a thread that lives as long as they do: Linux takes the end of that
    thread for the end of the launcher.
    """

    def __init__(self) -> None:
        reader, self._pipe = os.pipe()
        try:
            self._watchdog = subprocess.Popen(
                [*_script("watch"), str(reader)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(reader,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(reader)

    def start(
        self, command: Sequence[str], env: dict[str, str], stdout: int, stderr: int
    ) -> "subprocess.Popen[bytes]":
        """Starts a command as leader of a session and process group of its own.

        Args:
            command: The path of a program, and its arguments.
            env: All environment variables.
            stdout: The file descriptor for its output.
            stderr: The file descriptor for its error output.

        Returns:
            The running process.
        """
        return subprocess.Popen(
            [*_script("run"), str(self._pipe), str(os.getpid()), *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(self._pipe,),
            start_new_session=True,
        )

    def forget(self, pid: int) -> None:
        """Takes a process group off the watchdog's list.

        Args:
            pid: The process that leads it. It must not have been waited for yet, or else its id
                could belong to another process by now.
        """
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, b"-%d\n" % pid)

    def close(self) -> None:
        """Ends the watchdog, which kills every process group that is still on its list."""
        if self._pipe < 0:
            return
        os.close(self._pipe)
        self._pipe = -1
        try:
            self._watchdog.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._watchdog.kill()
            self._watchdog.wait(_CLOSE_SECONDS)

    def __enter__(self) -> "OrphanGuard":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _script(role: str) -> list[str]:
    # Isolated and without site: it must neither import from the job's directory nor take long.
    return [sys.executable, "-I", "-S", os.path.abspath(guard_process.__file__), role]
