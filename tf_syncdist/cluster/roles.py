"""Roles and addresses, from TF_CONFIG or any other cluster resolver of tf.distribute."""

import json
import os
from typing import NamedTuple

from tf_syncdist.errors import ClusterConfigError


class ClusterRole(NamedTuple):
    """What this process is, and where the others are.

    Args:
        task_type: "worker" or "ps"; a `chief` task is worker 0.
        task_index: Index of the task among its type.
        workers: Addresses of the workers; empty for a single worker without cluster.
        aggregators: Addresses of the `ps` tasks, one shard each.
    """

    task_type: str
    task_index: int
    workers: tuple[str, ...]
    aggregators: tuple[str, ...]

    @property
    def num_workers(self) -> int:
        """Number of training workers, at least 1."""
        return max(1, len(self.workers))

    @property
    def is_aggregator(self) -> bool:
        """Whether this process is a `ps` task."""
        return self.task_type == "ps"

    @property
    def service_addresses(self) -> tuple[str, ...]:
        """Where the aggregation service is: the `ps` tasks, or else worker 0's own address."""
        return self.aggregators or self.workers[:1]

    @property
    def address(self) -> str:
        """The address of this task."""
        return (self.aggregators if self.is_aggregator else self.workers)[self.task_index]


SINGLE_WORKER = ClusterRole("worker", 0, (), ())


def resolve(cluster_resolver: object | None = None) -> ClusterRole:
    """Returns the role of this process.

    Args:
        cluster_resolver: A `tf.distribute.cluster_resolver.ClusterResolver`; by default the one
            that reads TF_CONFIG.

    Returns:
        A `ClusterRole`; without a cluster, that of a single worker.

    Raises:
        ClusterConfigError: If the cluster cannot be used; the message says what to change.
    """
    import tensorflow as tf

    if cluster_resolver is None:
        text = os.environ.get("TF_CONFIG", "").strip()
        if not text:
            return SINGLE_WORKER
        _check_tf_config(text)
        cluster_resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    cluster = cluster_resolver.cluster_spec().as_dict()
    return role_in(cluster, cluster_resolver.task_type, cluster_resolver.task_id)


def role_in(
    cluster: dict[str, list[str]], task_type: str | None, task_index: int | None
) -> ClusterRole:
    """Returns the role of a task in a cluster given as lists of addresses."""
    jobs = {name: tuple(_addresses(tasks)) for name, tasks in cluster.items()}
    unknown = sorted(set(jobs) - {"chief", "worker", "ps", "evaluator"})
    if unknown:
        raise ClusterConfigError(
            "Expected the jobs `worker`, `chief` and `ps` in the cluster. "
            f"Received: {', '.join(unknown)}. Rename them; `ps` tasks are the aggregation service."
        )
    workers = jobs.get("chief", ()) + jobs.get("worker", ())
    if not workers:
        if jobs.get("ps"):
            raise ClusterConfigError(
                "Expected at least one `worker` task in the cluster. Received: only `ps` tasks."
            )
        return SINGLE_WORKER
    index = int(task_index or 0)
    if task_type not in jobs or not 0 <= index < len(jobs[task_type]):
        sizes = {name: len(tasks) for name, tasks in jobs.items()}
        raise ClusterConfigError(
            f"Expected a task of the cluster, which has {sizes}. Received: task type "
            f'{task_type!r}, index {task_index!r}. Set "task" in TF_CONFIG to '
            '{"type": "worker", "index": I} with I counted from 0.'
        )
    if task_type == "evaluator":
        raise ClusterConfigError(
            "Expected a `worker`, `chief` or `ps` task. Received: an `evaluator` task. Evaluate on "
            "any worker, or run the evaluator without this strategy."
        )
    if task_type == "worker":
        index += len(jobs.get("chief", ()))
    kind = "ps" if task_type == "ps" else "worker"
    return ClusterRole(kind, index, workers, jobs.get("ps", ()))


def _addresses(tasks: object) -> list[str]:
    if isinstance(tasks, dict):
        return [tasks[i] for i in sorted(tasks, key=int)]
    return list(tasks)


def _check_tf_config(text: str) -> None:
    """Foresees what TensorFlow's resolver would answer with a bare KeyError or JSON error."""
    example = (
        '{"cluster": {"worker": ["127.0.0.1:5000", "127.0.0.1:5001"]}, '
        '"task": {"type": "worker", "index": 0}}'
    )
    try:
        config = json.loads(text)
    except ValueError as e:
        raise ClusterConfigError(
            f"Expected TF_CONFIG to be JSON such as {example}. Received: {text[:200]!r} ({e})."
        ) from e
    cluster = config.get("cluster", {}) if isinstance(config, dict) else None
    if not isinstance(cluster, dict):
        raise ClusterConfigError(
            f"Expected TF_CONFIG to be an object such as {example}. Received: {text[:200]!r}."
        )
    for name, tasks in cluster.items():
        if isinstance(tasks, dict):
            good = all(index.isdigit() for index in tasks)
            addresses = list(tasks.values())
        else:
            good = isinstance(tasks, list)
            addresses = tasks if good else []
        good = good and all(
            isinstance(a, str) and a.rpartition(":")[2].isdigit() and a.rpartition(":")[0]
            for a in addresses
        )
        if not good:
            raise ClusterConfigError(
                f'Expected a list of "host:port" for job {name!r} in TF_CONFIG. '
                f"Received: {tasks!r}."
            )
    task = config.get("task", {})
    if cluster and (not isinstance(task, dict) or "type" not in task or "index" not in task):
        raise ClusterConfigError(
            'Expected "task": {"type": ..., "index": ...} in TF_CONFIG, since it has a cluster. '
            f"Received: task={task!r}."
        )
    if cluster and not str(task["index"]).isdigit():
        raise ClusterConfigError(
            f"Expected a task index of at least 0 in TF_CONFIG. Received: {task['index']!r}."
        )
