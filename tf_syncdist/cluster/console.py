"""Writes the lines of many tasks to the launcher's own output.

On a terminal the line that a task is still writing, most often a progress bar, is shown live on
the bottom line. There is one bottom line and there may be many tasks, so it belongs to the task
that took it first, until that line ends or has not changed for a second; meanwhile the lines that
the others finish scroll by above it. Anywhere else only finished lines are written.
"""

import os
import select
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tf_syncdist.cluster import output

STDOUT = 1
STDERR = 2

_OWNER_SECONDS = 1.0
_RETRY_SECONDS = 1.0
_ERASE = b"\r\x1b[K"


class _Live(NamedTuple):
    source: object
    fd: int
    text: bytes
    updated: float


class Console:
    """Writes whole lines with a label, and keeps one live line at the bottom of a terminal.

    The file descriptors are written to without Python's buffers: nothing waits in them, and no
    lock of theirs is held by a thread that is stuck when the interpreter ends.

    Args:
        clock: Returns a time in seconds; a parameter for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._clock = clock
        self._live: _Live | None = None
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._terminals = {fd for fd in (STDOUT, STDERR) if not dumb and os.isatty(fd)}
        self._broken: set[int] = set()
        self.error: OSError | None = None
        """Why an output could not be written to, if so. What is sent there later is dropped."""

    def write_lines(self, source: object, fd: int, label: bytes, lines: Iterable[bytes]) -> None:
        """Writes finished lines.

        Args:
            source: The stream they come from; its live line, if it has one, is replaced.
            fd: `STDOUT` or `STDERR`.
            label: What to put before each line.
            lines: The lines, without newlines.
        """
        text = b"".join(label + line + b"\n" for line in lines)
        if not text:
            return
        if fd not in self._terminals:
            self._write(fd, text)
            return
        if self._live is not None:
            text = _ERASE + text
            if self._live.source is source:
                self._live = None
        self._write(fd, text)
        if self._live is not None:
            self._draw(self._live)

    def show(self, source: object, fd: int, label: bytes, partial: bytes) -> None:
        """Shows the present state of a line that has not ended; does nothing off a terminal.

        Args:
            source: The stream it comes from.
            fd: `STDOUT` or `STDERR`.
            label: What to put before the line.
            partial: What the line shows, empty if there is no such line.
        """
        if fd not in self._terminals:
            return
        live, now = self._live, self._clock()
        if live is not None and live.source is not source:
            if not partial or now - live.updated < _OWNER_SECONDS:
                return
        if partial:
            self._live = _Live(source, fd, label + partial.replace(b"\t", b" "), now)
            self._draw(self._live)
        elif live is not None:
            self._live = None
            self._write(live.fd, _ERASE)

    def _draw(self, live: _Live) -> None:
        try:
            columns = os.get_terminal_size(live.fd).columns or 80
        except OSError:
            columns = 80
        # A line that reached the last column would wrap, and could not be erased as one line.
        self._write(live.fd, _ERASE + output.fit(live.text, columns - 1))

    def _write(self, fd: int, text: bytes) -> None:
        if fd in self._broken:
            return
        left = memoryview(text)
        while left:
            try:
                left = left[os.write(fd, left) :]
            except BlockingIOError:
                # Whoever started the launcher made its output non-blocking.
                select.select([], [fd], [], _RETRY_SECONDS)
            except OSError as error:
                self._broken.add(fd)
                self.error = error
                return
