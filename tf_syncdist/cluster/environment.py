"""The environment variables of the tasks that the launcher starts."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

_PROBE_SECONDS = 60.0
_PROBE = """
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path]
spec = importlib.util.find_spec("tf_syncdist")
print(spec and spec.origin or "")
"""


def tf_config(
    task_type: str, index: int, worker_ports: Sequence[int], ps_ports: Sequence[int]
) -> str:
    """Describes the cluster, and a task's place in it, in TensorFlow's way.

    Args:
        task_type: `"worker"` or `"ps"`.
        index: Which of its type the task is.
        worker_ports: The port of each worker on this machine.
        ps_ports: The port of each aggregation service on this machine.

    Returns:
        The value of the environment variable `TF_CONFIG`.
    """
    cluster = {"worker": [f"127.0.0.1:{port}" for port in worker_ports]}
    if ps_ports:
        cluster["ps"] = [f"127.0.0.1:{port}" for port in ps_ports]
    return json.dumps({"cluster": cluster, "task": {"type": task_type, "index": index}})


def shared_environment(
    base: Mapping[str, str], found: str | None = None
) -> tuple[dict[str, str], str | None]:
    """Builds the environment variables that all tasks have in common.

    Where this package is not installed, as in a source checkout, the directory that holds it goes
    to the end of `PYTHONPATH`. It does so only then, as it holds other things, too, which would
    be found before installed packages of the same name.

    Args:
        base: The variables to start from.
        found: Where a task would find this package: the path of its `__init__.py`, or empty for
            nowhere. By default a Python process is started to find out.

    Returns:
        The variables, and a warning if tasks will import a copy of this package that differs from
        the launcher's.
    """
    env = dict(base)
    env["PYTHONUNBUFFERED"] = "1"
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if found is None:
        found = _find_package(env)
    if not found:
        paths = [env.get("PYTHONPATH", ""), os.path.dirname(_PACKAGE)]
        env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    elif not _same_package(os.path.dirname(os.path.realpath(found)), _PACKAGE):
        return env, (
            f"tasks will import tf_syncdist from {os.path.dirname(found)}, but the launcher is the "
            f"one in {_PACKAGE}; install one of them, or set PYTHONPATH"
        )
    return env, None


def _same_package(one: str, other: str) -> bool:
    """Says whether two directories hold the same modules, as a checkout and its installation do."""
    if one == other:
        return True
    modules = [
        {path.relative_to(root): path.read_bytes() for path in pathlib.Path(root).rglob("*.py")}
        for root in (one, other)
    ]
    return modules[0] == modules[1]


def _find_package(env: Mapping[str, str]) -> str:
    """Asks a fresh interpreter, which alone knows about editable installs and the like."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return ""
    # A sitecustomize module may print something of its own before.
    lines = probe.stdout.splitlines()
    return lines[-1] if probe.returncode == 0 and lines else ""
