"""Runs the tests with other versions of TensorFlow and Keras than those that are installed.

    python -m tests.matrix --pairs=2.18.1:3.10.0,newest:newest -- -x tests/strategies

Each pair of versions gets a fresh virtual environment of the running Python, with a copy of this
checkout installed as a user would do it. By default the pairs are the oldest versions that
setup.cfg admits and what pip chooses by itself. Arguments after `--` go to pytest. Ends with
status 1 if the tests of any pair fail. Needs Linux with git; leaves nothing behind.
"""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from absl import app, flags

_PAIRS = flags.DEFINE_list(
    "pairs",
    None,
    "Versions as TENSORFLOW:KERAS, separated by commas; `newest` leaves the choice to pip. "
    "Default: the oldest that setup.cfg admits, and newest:newest.",
)
_KEEP = flags.DEFINE_bool("keep", False, "Whether to keep the environments, to look into them.")
_INSTALL_SECONDS = flags.DEFINE_float("install_seconds", 900, "Deadline of one installation.")
_TEST_SECONDS = flags.DEFINE_float("test_seconds", 1800, "Deadline of the tests of one pair.")

_ROOT = Path(__file__).resolve().parents[1]
_NEWEST = "newest"
_VERSION = re.compile(rf"{_NEWEST}|\d+(\.\d+)*(rc\d+)?")
_COLUMNS = ("tensorflow", "keras", "python", "result", "seconds")
_FOREIGN = ("TF_CONFIG", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_GRACE_SECONDS = 20.0


class _Failed(Exception):
    """Says in few words why a pair has no test result."""


@dataclasses.dataclass
class _Row:
    tensorflow: str
    keras: str
    result: str
    passed: bool
    seconds: float
    python: str = platform.python_version()

    def cells(self) -> list[str]:
        """Returns what the table shows, in the order of `_COLUMNS`."""
        return [self.tensorflow, self.keras, self.python, self.result, f"{self.seconds:.0f}"]


def oldest_pair(setup_cfg: Path) -> str:
    """Returns the lower bounds of setup.cfg as a pair."""
    config = configparser.ConfigParser()
    config.read(setup_cfg)
    bounds = {}
    for line in config["options"]["install_requires"].splitlines():
        if found := re.match(r"(tensorflow|keras)\b[^#]*>=\s*([\d.]+)", line.strip()):
            bounds[found[1]] = found[2]
    return f"{bounds['tensorflow']}:{bounds['keras']}"


def _parse(pair: str) -> tuple[str, str]:
    versions = pair.strip().split(":")
    if len(versions) != 2 or not all(_VERSION.fullmatch(v) for v in versions):
        raise app.UsageError(
            "Expected pairs of TENSORFLOW:KERAS, such as 2.18.1:3.10.0 or newest:newest. "
            f"Received: {pair!r}."
        )
    return versions[0], versions[1]


def _copy_checkout(target: Path) -> None:
    """Copies what is in git or could be, as it lies here; edits during the tests do not matter."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=_ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = _ROOT / name
        if source.is_file():  # not so if it was deleted and that is not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def _run(command: Sequence[str | Path], cwd: Path, env: dict[str, str], seconds: float) -> int:
    """Runs a command in a process group of its own, of which nothing is left afterwards."""
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [str(c) for c in command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        stack.callback(_end_group, process)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise _Failed(f"took over {seconds:g} s") from None


def _end_group(process: subprocess.Popen) -> None:
    """Ends a process group, first so that tests can end what they have started."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(directory: Path, scratch: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in _FOREIGN}
    env["VIRTUAL_ENV"] = str(directory)
    env["PATH"] = f"{directory / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}"
    env["TMPDIR"] = str(scratch)
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return env


def _installed(directory: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    command = [directory / "bin" / "python", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return found.stdout.strip()


def _counts(report: Path) -> str:
    """Returns pytest's counts in words."""
    if not report.exists():
        raise _Failed("pytest has written no report")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    words = f"{counts['tests'] - failed - counts['skipped']} passed, {failed} failed"
    # JUnit has no word for tests that are expected to fail.
    return words + (f", {counts['skipped']} skipped or xfailed" if counts["skipped"] else "")


def _try_pair(
    pair: tuple[str, str], checkout: Path, scratch: Path, arguments: Sequence[str]
) -> _Row:
    """Installs a pair and runs the tests with it."""
    started = time.monotonic()
    row = _Row(*pair, result="", passed=False, seconds=0.0)
    try:
        directory = scratch / "venv"
        venv.create(directory, with_pip=True)
        env = _environment(directory, scratch)
        pins = [
            f"{name}=={version}"
            for name, version in zip(("tensorflow", "keras"), pair, strict=True)
            if version != _NEWEST
        ]
        pip = [directory / "bin" / "pip", "install", "--quiet", *pins, ".[test]"]
        if _run(pip, checkout, env, _INSTALL_SECONDS.value):
            raise _Failed("cannot be installed")
        row.tensorflow, row.keras = (_installed(directory, n) for n in ("tensorflow", "keras"))
        print(f"tests.matrix: TensorFlow {row.tensorflow}, Keras {row.keras}", flush=True)
        report = scratch / "junit.xml"
        # Not `python -m pytest`, which would find the package in the copy, not as installed.
        pytest = [directory / "bin" / "pytest", f"--junitxml={report}", *arguments]
        status = _run(pytest, checkout, env, _TEST_SECONDS.value)
        row.passed, row.result = status == 0, _counts(report)
        if status not in (0, 1):
            row.result += f", status {status}"
    except _Failed as e:
        row.result = str(e)
    row.seconds = time.monotonic() - started
    return row


def _table(rows: Sequence[_Row]) -> str:
    lines = [_COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(argv: Sequence[str]) -> None:
    """Tries all pairs."""
    pairs = _PAIRS.value or [oldest_pair(_ROOT / "setup.cfg"), f"{_NEWEST}:{_NEWEST}"]
    parsed = [_parse(pair) for pair in pairs]
    # Otherwise what was started, in groups of its own, would go on.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows = []
    with contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="tf_syncdist_matrix_"))
        if not _KEEP.value:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        _copy_checkout(scratch / "checkout")
        for number, pair in enumerate(parsed):
            print(f"tests.matrix: {':'.join(pair)} in {scratch / str(number)}", flush=True)
            (scratch / str(number)).mkdir()
            rows.append(_try_pair(pair, scratch / "checkout", scratch / str(number), argv[1:]))
    print(f"\n{_table(rows)}", flush=True)
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    app.run(main)
