"""Which arguments are the launcher's, and what it says about wrong ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tf_syncdist.cluster import arguments

ROOT = Path(arguments.__file__).parents[2]


@pytest.mark.parametrize(
    ("line", "own", "command"),
    [
        ("--n=3 s.py --n=9 x", ["--n=3"], ["s.py", "--n=9", "x"]),
        ("--n 3 s.py --flag", ["--n", "3"], ["s.py", "--flag"]),
        ("-n 3 s.py", ["-n", "3"], ["s.py"]),
        ("--bool s.py", ["--bool"], ["s.py"]),
        ("--nobool --n=1 s.py -m x", ["--nobool", "--n=1"], ["s.py", "-m", "x"]),
        ("--n 3 -m package.module --n=4", ["--n", "3"], ["-m", "package.module", "--n=4"]),
        ("--n 3 -- s.py -- x", ["--n", "3"], ["s.py", "--", "x"]),
        ("--help", ["--help"], []),
        ("--n", ["--n"], []),
        ("", [], []),
    ],
)
def test_split_arguments(line: str, own: list[str], command: list[str]) -> None:
    assert arguments.split_arguments(line.split(), lambda name: name == "n") == (own, command)


def run_launcher(tmp_path: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tf_syncdist.launch", *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--num_workers=0", "s.py"], "Received: num_workers=0."),
        (["s.py"], "Give the number of workers"),
        (["--num_workers=1", "--num_ps=-1", "s.py"], "Received: num_ps=-1."),
        (["--num_workers=1", "--grace_seconds=-1", "s.py"], "Received: grace_seconds=-1.0."),
        (["--num_workers=1", "--grace_seconds=inf", "s.py"], "Received: grace_seconds=inf."),
        (["--num_workers=1"], "Expected a script to run."),
        (["--num_workers=1", "-m"], "after -m"),
        (["--num_workers=1", "missing.py"], "Received: 'missing.py'"),
        (["--num_worker=1", "s.py"], "num_worker'"),
        (["--num_workers=many", "s.py"], "num_workers=many"),
        (["--num_workers"], "num_workers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, args: list[str], want: str) -> None:
    (tmp_path / "s.py").write_text("print('started')")
    result = run_launcher(tmp_path, *args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("tf_syncdist.launch: error: ")
    assert want in result.stderr


@pytest.mark.timeout(60)
def test_help_shows_the_flags(tmp_path: Path) -> None:
    result = run_launcher(tmp_path, "--help")
    for flag in ("num_workers", "num_ps", "grace_seconds", "[no]stop_on_failure"):
        assert f"--{flag}:" in result.stdout
    assert "python -m tf_syncdist.launch --num_workers=3 train.py" in result.stdout
