"""Ctrl-C and SIGTERM, also while the main thread is blocked inside a TensorFlow step.

Python runs a signal's handler on the main thread between two bytecodes. While that thread waits in
TensorFlow for a step, and the step for other workers, nothing happens. So a thread of ours learns
of the signal first and ends the waits; then the handler runs as usual and raises what ends the
program: KeyboardInterrupt for Ctrl-C, SystemExit for SIGTERM. If neither comes about in time,
because the main thread computes without looking up, the process is ended from that thread.

There is one watch per process, whoever asks for it first, and it is undone in forked children.
"""

import atexit
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from tf_syncdist.cluster.frames import WhenItGoesOn, exception_being_made, innermost_of_program

OnSignal = Callable[[signal.Signals], None]

# An orderly end has this long. With what comes after it, a process ends within 5 s of its signal.
_GRACE_SECONDS = 3.0
_FLUSH_SECONDS = 0.5

# The main thread is sent a signal again, more and more seldom, until it has taken notice.
_FIRST_PAUSE_SECONDS = 0.005
_MAX_PAUSE_SECONDS = 0.1

# A library may take so long to come back to the program, until an exception is raised within it.
_POLITE_SECONDS = 1.0

# The main thread may act on a signal before the watching thread does, by as much as this.
_SOONER_SECONDS = 5.0


def exit_status(number: int) -> int:
    """Returns the exit status of a process that a signal has ended, as a shell puts it.

    Not 0, also where the end was orderly: who started the process is to know that its work is not
    done, and may start it again.
    """
    return 128 + number


class InterruptWatcher:
    """Calls back on another thread as soon as Ctrl-C or SIGTERM arrives.

    Signals for which the program has installed a handler of its own are left to it: the handler
    may want to end later, and in its own way. Outside of the main thread, and where an event loop
    (a notebook's, say) listens for signals already, nothing is installed.

    Args:
        on_signal: Called with the signal, on the watching thread. It must not wait for the main
            thread, which is raising the exception meanwhile or is blocked.

    Attributes:
        received: The signal that has come, if one has.
    """

    def __init__(self, on_signal: OnSignal) -> None:
        self.received: signal.Signals | None = None
        self.on_signal = on_signal
        self._closed = False
        self._watch = _Watch.acquire()
        if self._watch is not None:
            self._watch.watchers.append(self)

    def close(self) -> None:
        """Stops watching. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.watchers.remove(self)
            self._watch.release()

    def __enter__(self) -> "InterruptWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Watch:
    """What is installed in this process: two handlers, a wake-up descriptor, and a thread."""

    _instance: "_Watch | None" = None
    last: "_Watch | None" = None

    @classmethod
    def acquire(cls) -> "_Watch | None":
        """Returns the watch of this process, or `None` if there cannot be one."""
        if cls._instance is None and threading.current_thread() is threading.main_thread():
            watch = cls()
            if watch._install():
                cls._instance = cls.last = watch
        return cls._instance

    def __init__(self) -> None:
        self.watchers: list[InterruptWatcher] = []
        self.is_ending = False
        # For each signal, when it last became an exception, and since when it is being acted on;
        # and those that became one before that, as the watching thread had no turn.
        self._raised_at = dict.fromkeys((signal.SIGINT, signal.SIGTERM), -math.inf)
        self._since: dict[int, float] = {}
        self._raised_early: set[int] = set()
        self._replaced: dict[int, object] = {}
        self._later = WhenItGoesOn()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def _install(self) -> bool:
        before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            self._reader.close()
            self._writer.close()
            return False
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, handler in usual.items():
            if signal.getsignal(number) is handler:
                self._replaced[number] = signal.signal(number, self._raise)
        threading.Thread(target=self._run, name="tf_syncdist_signals", daemon=True).start()
        return True

    def release(self) -> None:
        """Undoes everything if nobody watches any more."""
        # Only the main thread may change handlers. Without watchers, ours do what is usual.
        is_main = threading.current_thread() is threading.main_thread()
        if not self.watchers and not self.is_ending and is_main:
            self.uninstall()
            # Ends the thread's recv.
            self._writer.close()

    def uninstall(self) -> None:
        """Puts back what was there before."""
        if _Watch._instance is not self:
            return
        _Watch._instance = None
        signal.set_wakeup_fd(-1)
        for number, handler in self._replaced.items():
            if signal.getsignal(number) == self._raise:
                signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """Is the handler, on the main thread."""
        self._note(signal.Signals(number))
        if self._has_raised(number):
            return
        place = self._better_place(number, frame)
        if place is not frame:
            if place is not None:
                self._later.call(place, lambda: self._raise(number, place))
            return
        self._later.cancel()
        if number not in self._since:
            self._raised_early.add(number)
        self._raised_at[number] = time.monotonic()
        # Else TensorFlow's error for the step that was cut short would stand above it.
        if number == signal.SIGINT:
            raise KeyboardInterrupt from None
        if not self.is_ending:
            self.is_ending = True
            raise SystemExit(exit_status(number)) from None

    def _better_place(self, number: int, frame: FrameType | None) -> FrameType | None:
        """Returns the frame in which to raise; see `frames`."""
        if time.monotonic() < self._since.get(number, math.inf) + _POLITE_SECONDS:
            place = innermost_of_program(frame)
            if place is not frame:
                return place
        constructor = exception_being_made(frame)
        return frame if constructor is None else constructor.f_back

    @property
    def has_interrupted(self) -> bool:
        """Whether it has raised a KeyboardInterrupt."""
        return self._raised_at[signal.SIGINT] > -math.inf

    def _has_raised(self, number: int) -> bool:
        return self._raised_at[number] >= self._since.get(number, math.inf)

    def _note(self, number: signal.Signals) -> None:
        for watcher in list(self.watchers):
            watcher.received = watcher.received or number

    def _run(self) -> None:
        while data := self._reader.recv(16):
            for number in set(data) & set(self._replaced) - set(self._since):
                if signal.getsignal(number) == self._raise:
                    self._act(signal.Signals(number))
        self._reader.close()

    def _act(self, number: signal.Signals) -> None:
        now, raised_at = time.monotonic(), self._raised_at[number]
        was_early = number in self._raised_early and now - raised_at < _SOONER_SECONDS
        self._since[number] = raised_at if was_early else now
        self._note(number)
        threading.Thread(
            target=self._end, args=(number,), name="tf_syncdist_end", daemon=True
        ).start()
        for watcher in list(self.watchers):
            watcher.on_signal(number)

    def _end(self, number: signal.Signals) -> None:
        """Sees to it that the signal becomes an exception, or else the end of the process."""
        now = time.monotonic()
        give_up_at, pause = now + _GRACE_SECONDS, _FIRST_PAUSE_SECONDS
        main = threading.main_thread().ident
        assert main is not None
        while not self._has_raised(number) and now < give_up_at:
            threading.Event().wait(pause)
            if not self._has_raised(number):
                # A signal that comes just before a system call is not noticed.
                signal.pthread_kill(main, number)
            now, pause = time.monotonic(), min(2 * pause, _MAX_PAUSE_SECONDS)
        if number == signal.SIGINT and self._has_raised(number):
            # The program may take its time to act on it. What was sent in vain is on its way.
            threading.Event().wait(_MAX_PAUSE_SECONDS)
            self._raised_early.discard(number)
            del self._since[number]
            return
        threading.Event().wait(max(0.0, give_up_at - now))
        exit_now(number)


def exit_now(number: int) -> None:
    """Ends this process at once, as far as output goes in order.

    Args:
        number: The signal that is the reason.
    """
    # Whoever holds a lock of the output may be blocked for ever.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_SECONDS)
    os._exit(exit_status(number))


def _finish() -> None:
    """Leaves out what comes after the program's own end, if a signal has ended it.

    Python takes TensorFlow apart then, which waits for operations that still run, and no thread
    of Python's could end that any more.
    """
    watch = _Watch.last
    if watch is None:
        return
    if watch.is_ending:
        exit_now(signal.SIGTERM)
    if watch.has_interrupted and getattr(sys, "last_type", None) is KeyboardInterrupt:
        # As Python does it, so that a shell stops its script.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _flush()
        signal.raise_signal(signal.SIGINT)


# It comes after everything that is registered later.
atexit.register(_finish)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _after_fork() -> None:
    """Undoes in a forked child what would tell the parent of the child's signals."""
    if _Watch._instance is not None:
        _Watch._instance.uninstall()
    _Watch.last = None


os.register_at_fork(after_in_child=_after_fork)
