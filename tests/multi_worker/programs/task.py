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


def wait_less(strategy: tf_syncdist.SyncReplicasStrategy, seconds: float) -> None:
    """Lets a worker wait for so long for a service that went away; for its start it had longer."""
    session = strategy._member.session
    session.config = session.config._replace(connect_timeout_seconds=seconds)


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


def fall_behind(strategy: tf_syncdist.SyncReplicasStrategy, rounds: int = 2) -> None:
    """Waits until the job has done so many rounds more than this worker, however slowly."""
    over = strategy.local_report().rounds + rounds
    deadline = time.monotonic() + 100
    while strategy.report().rounds < over:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the others have not done {over} rounds within 100 s")
        time.sleep(0.01)


class FallsBehind(Pause):
    """Takes its time in training, and is late for certain, however busy the machine is.

    Args:
        seconds: How long each call takes; with 0 a worker is not slow at all.
        strategy: Tells what the job has done.
        always: Whether from the fifth call on, by which all have begun, every round is the others'.
            Otherwise the fifth call makes it late for two, if it has not been so late before.
    """

    def __init__(self, seconds: float, strategy: Any, always: bool = False, **kwargs: Any) -> None:
        super().__init__(seconds, **kwargs)
        self._job = strategy
        self._always = always
        self._calls = 0
        self._replayed = 0

    def _wait(self) -> None:
        self._calls += 1
        time.sleep(self.seconds)
        replayed = self._job.local_report().replayed
        if self._calls == 1:
            self._replayed = replayed
        if self._always and self._calls >= 5:
            fall_behind(self._job, 1)
        elif self._calls == 5 and replayed == self._replayed:
            fall_behind(self._job)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return after(inputs, self._wait) if training and self.seconds else inputs


def counts(strategy: tf_syncdist.SyncReplicasStrategy) -> dict[str, Any]:
    """Returns this worker's own counts and, as soon as all of it has arrived, the job's report."""
    meet(strategy, "report")
    deadline = time.monotonic() + 60
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
