"""Runs a program of `programs/` in a process of its own, which can have several CPU devices.

TensorFlow has to be told how many before it starts, and pytest's process has started it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tf_syncdist

_PROGRAMS = Path(__file__).parent / "programs"
_FOREIGN = ("TF_CONFIG", "PYTHONPATH")
_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_NUM_INTRAOP_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(Path(tf_syncdist.__file__).parents[1]),
}
_TAIL_LINES = 80


def run_program(
    program: str, directory: Path, *, devices: int, seconds: float = 240.0, **arguments: Any
) -> Mapping[str, Any]:
    """Runs a program and returns what it has written.

    Args:
        program: Name of a file in `programs/`.
        directory: Where its results and its output go.
        devices: How many CPU devices it is to have.
        seconds: How long it may take.
        arguments: Given to it as JSON, with `devices` and with the path for its `results`.

    Raises:
        AssertionError: If it fails or takes too long. The message has the end of its output.
    """
    results = directory / "results.json"
    arguments |= {"devices": devices, "results": str(results)}
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(_PROGRAMS / program), json.dumps(arguments)],
            cwd=directory,
            env={k: v for k, v in os.environ.items() if k not in _FOREIGN} | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            why = f"ended with status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            why = f"did not end within {seconds:g} s"
            process.terminate()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode or not results.exists():
        lines = log.read_text(errors="replace").splitlines()
        raise AssertionError("\n".join([f"{program} {why}", *lines[-_TAIL_LINES:]]))
    return json.loads(results.read_text())
