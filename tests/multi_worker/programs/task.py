"""What every worker program of these tests does: read arguments, meet the others, write results."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import tf_syncdist

ARGUMENTS: dict[str, Any] = json.loads(sys.argv[1])
_DIRECTORY = Path(ARGUMENTS["directory"])

# The machine may be busy with other tests; and these models are so small that they would be one
# bucket.
PATIENCE = {
    "connect_timeout_seconds": 100.0,
    "timeout_seconds": 150.0,
    "bucket_bytes": 300,
}


def patience(backup_workers: int = 0) -> dict[str, Any]:
    """Returns `PATIENCE` of a job in which no worker is left out, also not for having had no turn.

    What has to be as in one process is so only with everybody's values.
    """
    cluster = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {})
    workers = len(cluster.get("worker", ())) + len(cluster.get("chief", ()))
    return PATIENCE | {"min_workers": max(1, workers - backup_workers)}


def meet(strategy: tf_syncdist.SyncReplicasStrategy, place: str, seconds: float = 100.0) -> None:
    """Waits until every worker has come here; no part of what is tested."""
    (_DIRECTORY / f"{place}.{strategy.worker_index}").touch()
    deadline = time.monotonic() + seconds
    while len(list(_DIRECTORY.glob(f"{place}.*"))) < strategy.num_workers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all workers came to {place!r} within {seconds:g} s")
        time.sleep(0.02)


def after(value: tf.Tensor, wait: Callable[[], None]) -> tf.Tensor:
    """Returns a tensor as it is, after a call out of the graph."""

    def call() -> int:
        wait()
        return 0

    with tf.control_dependencies([tf.numpy_function(call, [], tf.int64)]):
        return tf.identity(value)


def slowly(value: tf.Tensor, seconds: float) -> tf.Tensor:
    """Returns a tensor as it is, after a pause in the graph."""
    return after(value, lambda: time.sleep(seconds)) if seconds else value


class Pause(keras.layers.Layer):
    """Takes its time in training."""

    def __init__(self, seconds: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seconds = seconds

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return slowly(inputs, self.seconds) if training else inputs


def counts(strategy: tf_syncdist.SyncReplicasStrategy) -> dict[str, Any]:
    """Returns this worker's own counts and, as soon as all of it has arrived, the job's report."""
    meet(strategy, "report")
    deadline = time.monotonic() + 10
    while True:
        report = strategy.report()
        arrived = [w.contributed + w.late + w.replayed for w in report.workers]
        if arrived == [report.rounds] * strategy.num_workers or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return {
        "local": strategy.local_report()._asdict(),
        "report": {"rounds": report.rounds, "workers": [w._asdict() for w in report.workers]},
        "report_text": str(report),
    }


def write(worker: int, results: dict[str, Any]) -> None:
    """Writes this worker's results, all at once."""
    path = _DIRECTORY / f"worker-{worker}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results))
    os.replace(unfinished, path)
