"""What a person sees on a terminal."""

import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)

Launch = Callable[..., Any]


class Terminal:
    """A terminal that a launcher writes to."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.data = b""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for(self, text: str) -> None:
        """Waits until something has been written."""
        with self._changed:
            assert self._changed.wait_for(lambda: text.encode() in self.data, 45), self.data

    def finish(self) -> str:
        """Returns all that was written, once nobody holds the terminal open."""
        os.close(self.slave)
        self._thread.join(45)
        assert not self._thread.is_alive()
        os.close(self.master)
        return self.data.decode()

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 65536):
                with self._changed:
                    self.data += data
                    self._changed.notify_all()
        except OSError:
            pass  # How Linux says that the other end is closed.


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    yield Terminal()


def shown_in_the_end(written: str) -> list[str]:
    """What a terminal shows, given that lines are erased as a whole or not at all."""
    return [line.rpartition("\r\x1b[K")[2] for line in written.replace("\r\n", "\n").split("\n")]


def test_a_progress_bar_is_shown_live(launch: Launch, terminal: Terminal, tmp_path: Path) -> None:
    script = """
        import pathlib, time
        for percent in (0, 50, 100):
            print(f"\\r{percent}%", end="")
            while not pathlib.Path(f"seen {percent}").exists():
                time.sleep(0.02)
        print()
    """
    job = launch(script, "--num_workers=1", "script.py", stdout=terminal.slave)
    for percent in (0, 50, 100):
        terminal.wait_for(f"\r\x1b[K[worker 0] {percent}%")
        (tmp_path / f"seen {percent}").touch()
    assert job.wait() == 0
    assert shown_in_the_end(terminal.finish()) == ["[worker 0] 100%", ""]


def test_bars_and_lines_of_several_tasks_do_not_mix(launch: Launch, terminal: Terminal) -> None:
    script = """
        import json, os, time
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        for epoch in range(3):
            for percent in range(0, 101, 10):
                print(f"\\repoch {epoch}: {percent}%", end="")
                time.sleep(0.01)
            print(f"\\nworker {index} ends epoch {epoch}")
    """
    job = launch(script, "--num_workers=3", "script.py", stdout=terminal.slave)
    assert job.wait() == 0
    want = [
        f"[worker {index}] {text}"
        for index in range(3)
        for epoch in range(3)
        for text in (f"epoch {epoch}: 100%", f"worker {index} ends epoch {epoch}")
    ]
    assert sorted(shown_in_the_end(terminal.finish())) == sorted([*want, ""])


def test_a_live_line_is_cut_to_the_terminals_width(
    launch: Launch, terminal: Terminal, tmp_path: Path
) -> None:
    fcntl.ioctl(terminal.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    script = """
        import pathlib, time
        print("x" * 100, end="")
        while not pathlib.Path("seen").exists():
            time.sleep(0.02)
        print()
    """
    job = launch(script, "--num_workers=1", "script.py", stdout=terminal.slave)
    terminal.wait_for("[worker 0] xxxxxxxx")
    (tmp_path / "seen").touch()
    assert job.wait() == 0
    written = terminal.finish()
    assert "\r\x1b[K[worker 0] xxxxxxxx\r\x1b[K" in written
    assert shown_in_the_end(written) == ["[worker 0] " + "x" * 100, ""]
