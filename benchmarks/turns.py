"""Processes that live as long as a benchmark and compute only when it is their turn.

Systems that take turns are hit alike by a change of the machine's load, and each of them starts
TensorFlow only once.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_LOG_TAIL_LINES = 40


class TurnProcess:
    """A process that answers each line of its input with a line of JSON, and does nothing else.

    Args:
        name: Stands in messages, and names its log.
        module: Started with `python -m`.
        flags: Its flags.
        directory: Where its log goes.
        give_up_at: The time.time() at which it has to exit by itself; it is given to it as a flag.
    """

    def __init__(
        self,
        name: str,
        module: str,
        flags: Sequence[str],
        directory: pathlib.Path,
        give_up_at: float,
    ) -> None:
        self._name = name
        self._log_file = directory / f"{name}.log"
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *flags, f"--give_up_at={give_up_at}"],
                cwd=_ROOT,
                env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def ask(self, line: str) -> dict[str, Any]:
        """Returns the answer to a line.

        Raises:
            RuntimeError: The process has ended; it does so at its deadline.
        """
        # A process that has ended is noticed below, where its log is at hand.
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
        for answer in self._process.stdout:
            if answer.startswith("{"):
                return json.loads(answer)
        raise RuntimeError(
            f"Expected an answer from the process of {self._name}, but it has ended with exit "
            f"code {self._process.wait(timeout=10)}; raise --timeout_seconds if the machine is "
            f"slow. Its log:\n{self.log_tail()}"
        )

    def log_tail(self) -> str:
        """Returns the last lines that it has printed."""
        lines = self._log_file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(lines)

    def kill(self) -> None:
        """Ends the process and what it has started. May be called twice."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)
