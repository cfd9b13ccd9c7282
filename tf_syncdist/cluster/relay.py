"""Reads what the tasks write and passes it on line by line.

One thread does all of it, so lines cannot mix, and the thread that looks after the tasks is never
held up by an output that nobody reads.
"""

import functools
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tf_syncdist.cluster.console import STDERR, STDOUT, Console
from tf_syncdist.cluster.output import LineBuffer, is_startup_chatter

_READ_BYTES = 1 << 16
_SELECT_SECONDS = 0.2
_JOIN_SECONDS = 1.0

# What a task leaves behind in its pipes is read to the end. But a daemon of its own may hold them
# open for ever, so from then on silence or more than a pipe can hold counts as the end.
_AFTER_END_SECONDS = 0.5
_AFTER_END_BYTES = 1 << 20

_SWEEPS_BEFORE_REQUESTS = 4


class _Stream:
    """One output of one task."""

    def __init__(self, task: str, reader: int, fd: int, drop: Callable[[bytes], bool]) -> None:
        self.task = task
        self.reader = reader
        self.fd = fd
        self.drop = drop
        self.label = b"[%s] " % task.encode()
        self.buffer = LineBuffer()
        self.close_at: float | None = None
        self.bytes_left = _AFTER_END_BYTES


class Relay:
    """Passes the output of tasks on to the launcher's own, each line with the task's name.

    Args:
        filter_tf_startup: Whether to drop TensorFlow's C++ start-up chatter from error output.
    """

    def __init__(self, filter_tf_startup: bool) -> None:
        self._drop_chatter = is_startup_chatter if filter_tf_startup else _keep
        self._console = Console()
        self._streams: dict[int, _Stream] = {}
        self._selector = selectors.DefaultSelector()
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        os.set_blocking(self._wake_reader, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._finishing = False
        self._closed = False
        # A daemon: it may be stuck in a write to a pipe which nobody reads any more.
        self._thread = threading.Thread(target=self._run, name="launcher-relay", daemon=True)
        self._thread.start()

    @property
    def error(self) -> OSError | None:
        """Why the launcher's own output could not be written to, if so."""
        return self._console.error

    def open(self, task: str) -> tuple[int, int]:
        """Makes the pipes for a task that is about to start.

        Args:
            task: The name to put before its lines.

        Returns:
            The file descriptors for its output and its error output. The caller closes them.
        """
        out_reader, out_writer = os.pipe()
        err_reader, err_writer = os.pipe()
        self._post(functools.partial(self._add, _Stream(task, out_reader, STDOUT, _keep)))
        self._post(
            functools.partial(self._add, _Stream(task, err_reader, STDERR, self._drop_chatter))
        )
        return out_writer, err_writer

    def task_ended(self, task: str) -> None:
        """Tells that a task has ended, so that only what is left in its pipes is still to come.

        Args:
            task: The name as given to `open`.
        """
        self._post(functools.partial(self._expect_end, task))

    def say(self, message: str) -> None:
        """Writes a line of the launcher's own to its error output.

        Args:
            message: The line.
        """
        line = message.encode(errors="replace")
        self._post(
            functools.partial(self._console.write_lines, self, STDERR, b"[launcher] ", [line])
        )

    def finish(self) -> None:
        """Asks the relay to end when everything has been passed on. Does not wait for it."""
        self._post(self._set_finishing)

    @property
    def finished(self) -> bool:
        """Whether everything has been passed on after `finish`."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Ends the relay, whatever has not been passed on by then."""
        if self._closed:
            return
        self._closed = True
        self.finish()
        self._thread.join(_JOIN_SECONDS)
        if self.finished:
            os.close(self._wake_writer)

    def __enter__(self) -> "Relay":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _post(self, request: Callable[[], None]) -> None:
        self._requests.put(request)
        try:
            os.write(self._wake_writer, b"x")
        except (BlockingIOError, BrokenPipeError):
            pass  # Full of wake-ups already, or the relay has ended.

    def _run(self) -> None:
        while not (self._finishing and not self._streams and self._requests.empty()):
            self._sweep(_SELECT_SECONDS)
            requests = [self._requests.get() for _ in range(self._requests.qsize())]
            if requests:
                # A message about a task has to come after what the task wrote before it.
                for _ in range(_SWEEPS_BEFORE_REQUESTS):
                    self._sweep(0.0)
            for request in requests:
                request()
        self._selector.close()
        os.close(self._wake_reader)

    def _sweep(self, timeout: float) -> None:
        """Reads once from every pipe that has something, and gives up those that never end."""
        ready = {key.fd for key, _ in self._selector.select(timeout)}
        if self._wake_reader in ready:
            os.read(self._wake_reader, _READ_BYTES)
        now = time.monotonic()
        for stream in list(self._streams.values()):
            if stream.reader in ready:
                self._read(stream)
            elif stream.close_at is not None and now >= stream.close_at:
                self._remove(stream)

    def _set_finishing(self) -> None:
        self._finishing = True

    def _add(self, stream: _Stream) -> None:
        self._streams[stream.reader] = stream
        self._selector.register(stream.reader, selectors.EVENT_READ)

    def _expect_end(self, task: str) -> None:
        for stream in self._streams.values():
            if stream.task == task:
                stream.close_at = time.monotonic() + _AFTER_END_SECONDS

    def _read(self, stream: _Stream) -> None:
        data = os.read(stream.reader, _READ_BYTES)
        if not data:
            self._remove(stream)
            return
        self._pass_on(stream, stream.buffer.feed(data))
        if stream.close_at is not None:
            stream.bytes_left -= len(data)
            if stream.bytes_left <= 0:
                self._remove(stream)
                return
        partial = stream.buffer.partial
        if not stream.drop(partial):
            self._console.show(stream, stream.fd, stream.label, partial)

    def _remove(self, stream: _Stream) -> None:
        self._pass_on(stream, stream.buffer.finish())
        self._console.show(stream, stream.fd, stream.label, b"")
        self._selector.unregister(stream.reader)
        del self._streams[stream.reader]
        os.close(stream.reader)

    def _pass_on(self, stream: _Stream, lines: list[bytes]) -> None:
        lines = [line for line in lines if not stream.drop(line)]
        self._console.write_lines(stream, stream.fd, stream.label, lines)


def _keep(line: bytes) -> bool:
    return False
