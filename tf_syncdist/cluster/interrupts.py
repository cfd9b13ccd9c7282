"""Ctrl-C while the main thread is blocked inside a TensorFlow step."""

import signal
import socket
import threading
from collections.abc import Callable


class InterruptWatcher:
    """Calls back on another thread as soon as Ctrl-C arrives and Python is to raise for it.

    Python runs handlers on the main thread between two bytecodes. While that thread waits in
    TensorFlow for a step, and the step for other workers, nothing happens; so the wait has to be
    ended first, and then the handler runs as usual.

    Args:
        on_interrupt: Called with the signal, on this watcher's thread.
    """

    def __init__(self, on_interrupt: Callable[[signal.Signals], None]) -> None:
        self._on_interrupt = on_interrupt
        self._closed = False
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self.active = self._install()
        if self.active:
            thread = threading.Thread(target=self._watch, name="tf_syncdist_signals", daemon=True)
            thread.start()

    def close(self) -> None:
        """Stops watching. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.active and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        # Ends the thread's recv.
        self._write.close()

    def __enter__(self) -> "InterruptWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _install(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            return False
        before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        if before != -1:
            # An event loop (a notebook's, say) has it already and keeps it.
            signal.set_wakeup_fd(before)
            return False
        return True

    def _watch(self) -> None:
        while data := self._read.recv(16):
            for number in data:
                # A handler of the user's own may want to end later, and in its own way.
                default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
                if number == signal.SIGINT and default:
                    self._on_interrupt(signal.SIGINT)
        self._read.close()
