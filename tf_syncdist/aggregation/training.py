"""Has models of run-times trained in a process of its own, which takes TensorFlow and minutes."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tf_syncdist.cluster.child import environment
from tf_syncdist.cluster.guard import OrphanGuard
from tf_syncdist.cutoff import traces
from tf_syncdist.cutoff.planning import TrainingRequest

if TYPE_CHECKING:
    from tf_syncdist.cutoff.models import RunTimeModel

# On two idle cores it takes three minutes, but it runs only when workers leave something over.
_TIMEOUT_SECONDS = 3600.0

_COMMAND = (sys.executable, "-m", "tf_syncdist.train_cutoff")
_LOWEST_PRIORITY = 19
_MOST_WORDS = 400


class Training:
    """A process that trains a model, at the lowest priority. It ends when this process does.

    Not for several threads.

    Args:
        timeout_seconds: How long it may take.
        command: What is started, with `--trace=`, `--output=` and `--seed=`.
    """

    def __init__(
        self, timeout_seconds: float = _TIMEOUT_SECONDS, command: Sequence[str] = _COMMAND
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._command = command
        self._guard: OrphanGuard | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._since = 0.0
        self._failure = ""

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether a training was begun of which the end was not told."""
        return self._directory is not None

    def start(self, request: TrainingRequest) -> None:
        """Begins to train a model; whatever comes of it, `poll` tells."""
        self._directory = Path(tempfile.mkdtemp(prefix="tf_syncdist_training_"))
        self._since = time.monotonic()
        self._failure = ""
        try:
            traces.save(self._directory / "trace.npz", request.trace)
            self._guard = OrphanGuard()
            with open(self._directory / "log", "wb") as log:
                self._process = self._guard.start(
                    [
                        *self._command,
                        f"--trace={self._directory / 'trace.npz'}",
                        f"--output={self._directory / 'model.npz'}",
                        f"--seed={request.seed}",
                    ],
                    _environment(),
                    log.fileno(),
                    log.fileno(),
                )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _LOWEST_PRIORITY)
        except (OSError, ValueError) as e:
            self._failure = f"{type(e).__name__}: {e}"

    def poll(self) -> "RunTimeModel | str | None":
        """Returns the model, or in words why there is none; `None` while it is being trained."""
        if self._directory is None:
            return None
        if self._failure:
            self._failure, failure = "", self._failure
            self.close()
            return failure
        code = self._process.poll()
        if code is None:
            if time.monotonic() - self._since < self._timeout_seconds:
                return None
            self.close()
            return f"it took longer than {self._timeout_seconds:g} s"
        try:
            return self._result(code)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the process if it runs. May be called twice."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            else:
                self._guard.forget(self._process.pid)
            self._process.wait(60.0)
            self._process = None
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _result(self, code: int) -> "RunTimeModel | str":
        if code:
            words = ""
            with contextlib.suppress(OSError):
                words = (self._directory / "log").read_text(errors="replace").strip()
            return f"exit code {code}: {words[-_MOST_WORDS:]}"
        from tf_syncdist.cutoff import models

        try:
            return models.load(self._directory / "model.npz")
        except ValueError as e:
            return str(e)


def _environment() -> dict[str, str]:
    env = environment()
    env.pop("TF_CONFIG", None)
    # The workers' accelerators are busy, and none is needed.
    return {**env, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
