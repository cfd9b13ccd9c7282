"""Runs the launcher as a process for tests, and reads along."""

import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tf_syncdist.cluster import launcher

_ROOT = Path(launcher.__file__).parents[2]
_DEADLINE_SECONDS = 45.0


class Launched:
    """A launcher that runs, whose stdout and stderr are read as one.

    Args:
        directory: Where the script is written and run.
        script: What each worker runs; it is called `script.py`.
        arguments: Of the launcher.
        stdout: Where stdout goes instead, so that only stderr is read.
    """

    def __init__(
        self, directory: Path, script: str, arguments: tuple[str, ...], stdout: int | None
    ) -> None:
        path = directory / "script.py"
        if not path.exists():  # The workers of another launcher may be reading it.
            path.write_text(textwrap.dedent(script))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tf_syncdist.launch", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if stdout is None else subprocess.PIPE,
            start_new_session=True,
        )
        self.data = b""
        self._pipe = self.process.stdout or self.process.stderr
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """What has come so far."""
        return self.data.decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        """The lines that have come so far."""
        return self.text.splitlines()

    def wait_for(self, pattern: str, count: int = 1) -> list[str]:
        """Waits until so many matches of a pattern have come, and returns them all."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: len(re.findall(pattern, self.text)) >= count, _DEADLINE_SECONDS
            )
        assert enough, f"{pattern!r} has not come {count} times in: {self.text!r}"
        return re.findall(pattern, self.text)

    def wait(self) -> int:
        """Waits for the launcher's end and the end of its output, and returns its status."""
        status = self.process.wait(_DEADLINE_SECONDS)
        self._thread.join(_DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "someone still holds the launcher's output open"
        return status

    def close(self) -> None:
        """Kills the launcher if it still runs."""
        self.process.kill()
        self.process.wait(_DEADLINE_SECONDS)
        self._thread.join(_DEADLINE_SECONDS)

    def _read(self) -> None:
        assert self._pipe is not None
        with self._pipe as pipe:
            while data := os.read(pipe.fileno(), 65536):
                with self._changed:
                    self.data += data
                    self._changed.notify_all()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers in the test's directory, with a script and the launcher's arguments."""
    started: list[Launched] = []

    def start(script: str, *arguments: str, stdout: int | None = None) -> Launched:
        started.append(Launched(tmp_path, script, arguments, stdout))
        return started[-1]

    yield start
    for launched in started:
        launched.close()
