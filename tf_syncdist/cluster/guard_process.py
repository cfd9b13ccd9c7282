"""The two small processes which see to it that no task outlives its launcher.

This file is run as a script by `guard.py`, and must not import tf_syncdist: it starts before every
task, so it has to be quick. Its roles:

`watch FD` is the watchdog of a job. It reads `+PID` and `-PID` lines and kills the process groups
that are left when the pipe ends, which it does when the launcher is gone, however it went.

`run FD LAUNCHER COMMAND...` becomes the command, after it has told the watchdog its own id. As it
does so itself, there is no moment at which the launcher could die and leave it behind unknown.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def watch(fd: int) -> None:
    """Kills the process groups that are registered when the pipe ends.

    Args:
        fd: The reading end of the pipe.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    groups: set[int] = set()
    with open(fd, encoding="ascii") as pipe:
        for line in pipe:
            group = int(line[1:])
            if line[0] == "+":
                groups.add(group)
            else:
                groups.discard(group)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def run(fd: int, launcher: int, command: list[str]) -> None:
    """Becomes the command, whose end is tied to that of the launcher.

    Args:
        fd: The writing end of the watchdog's pipe.
        launcher: The process id of the launcher.
        command: The program and its arguments.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.write(fd, b"+%d\n" % os.getpid())
    _die_with_parent()
    if os.getppid() != launcher:
        sys.exit(1)
    os.close(fd)
    os.execv(command[0], command)


def _die_with_parent() -> None:
    """Asks Linux to kill this process with its parent, in case the watchdog was killed as well."""
    if sys.platform != "linux":
        return
    try:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        pass


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(int(sys.argv[2]))
    else:
        run(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
