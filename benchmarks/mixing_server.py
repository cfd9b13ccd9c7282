"""The process of benchmarks.mixing that starts all others.

It imports TensorFlow once, and forks processes for every run before TensorFlow computes anything.
It reads a request from each line of its input, and answers with a line of JSON: what the processes
returned, or which of them failed.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, NamedTuple

from absl import app, flags

import tf_syncdist
from benchmarks import mixing_control, mixing_job_worker, mixing_learner_worker, mixing_task
from benchmarks.mixing_settings import Settings
from examples.mnist_data import Dataset

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of MNIST's IDX files.")
_GIVE_UP_AT = flags.DEFINE_float("give_up_at", None, "time.time() of the end.", required=True)

_POLL_SECONDS = 0.01
# Enough for a process to print its stacks before it is killed.
_GRACE_SECONDS = 2.0


class _Child(NamedTuple):
    """What a forked process finds.

    Args:
        request: What was asked for.
        index: Which of the processes it is.
        directory: Where its result goes.
        give_up_at: The time.time() at which it has to end.
    """

    request: dict[str, Any]
    index: int
    directory: pathlib.Path
    give_up_at: float

    @property
    def result_file(self) -> pathlib.Path:
        """Where its result goes."""
        return self.directory / f"{self.index}.json"


def _serve() -> _Child | None:
    """Forks until the input ends; returns in every new process, and None in this one."""
    for line in sys.stdin:
        request = json.loads(line)
        num_processes = len(request.get("addresses", [""]))
        give_up_at = min(_GIVE_UP_AT.value, time.time() + request["seconds"])
        # New processes leave this function with the directory in use, so it is no context manager.
        directory = pathlib.Path(tempfile.mkdtemp(prefix="benchmark_"))
        mixing_control.create(directory / "control", num_processes)
        children: dict[int, _Child] = {}
        for index in range(num_processes):
            child = _Child(request, index, directory, give_up_at)
            pid = os.fork()
            if not pid:
                return child
            children[pid] = child
        try:
            answer = _answer(children, give_up_at)
        finally:
            shutil.rmtree(directory)
        print(json.dumps(answer), flush=True)
    return None


def _answer(children: dict[int, _Child], give_up_at: float) -> dict[str, Any]:
    """Waits for the processes, and returns what they returned or what has failed."""
    running = dict(children)
    failed = None
    while running:
        if failed is None and time.time() > give_up_at + _GRACE_SECONDS:
            failed = f"{len(running)} of {len(children)} processes did not end in time"
        for pid in list(running):
            if failed is not None:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            child = running.pop(pid)
            if status and failed is None:
                code = os.waitstatus_to_exitcode(status)
                failed = f"process {child.index} ended with exit code {code}"
        time.sleep(_POLL_SECONDS)
    if failed is not None:
        return {"failed": failed}
    return {"results": [json.loads(child.result_file.read_text()) for child in children.values()]}


def _run(child: _Child, data: Dataset) -> dict[str, Any]:
    """Does what was asked for."""
    request = child.request
    settings = Settings(**request["settings"])
    if "learners" in request:
        task = mixing_learner_worker.Task(**request["learners"])
        return mixing_learner_worker.train(task, settings, data)
    addresses = request["addresses"]
    control = mixing_control.Control(
        child.directory / "control", child.index, len(addresses), child.give_up_at
    )
    job = mixing_job_worker.Job(**request["job"], addresses=addresses)
    return mixing_job_worker.train(job, child.index, settings, data, control)


def _become(child: _Child, data: Dataset) -> None:
    """Turns a new process into one that does what was asked for."""
    null = os.open(os.devnull, os.O_RDWR)
    for inherited in (0, 1):
        os.dup2(null, inherited)
    # Not before the fork: a new process would wait for a thread that it does not have.
    faulthandler.dump_traceback_later(max(0.1, child.give_up_at - time.time()), exit=True)
    try:
        child.result_file.write_text(json.dumps(_run(child, data)))
    except Exception:
        # Strategies would wait for others at the end of the interpreter.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main(argv: list[str]) -> None:
    """Forks until the input ends."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    # These are imported at their first use.
    _ = [getattr(tf_syncdist, name) for name in tf_syncdist.__all__]
    data = mixing_task.load(_DATA_DIR.value)
    gc.collect()
    gc.freeze()
    child = _serve()
    if child is not None:
        _become(child, data)


if __name__ == "__main__":
    app.run(main)
