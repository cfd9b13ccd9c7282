"""Checks of what users give to a strategy."""

import os

import tensorflow as tf

from tf_syncdist.cluster.roles import ClusterRole
from tf_syncdist.cutoff import BackupWorkers, CutoffPolicy, FullSync, serialize, waits_for_all
from tf_syncdist.observability.timeline import Timeline, task_path
from tf_syncdist.propagation import (
    AutoPropagation,
    FifoPropagation,
    PriorityPropagation,
    Propagation,
)
from tf_syncdist.strategies.nonfinite import POLICIES
from tf_syncdist.transport.credentials import Credentials

COMPRESSIONS = {None: None, "float16": tf.float16, "bfloat16": tf.bfloat16}
TRANSPORTS = ("auto", "grpc", "shared_memory")
_MAX_BUCKET_BYTES = 64 * 2**20


def policy(backup_workers: int | None, cutoff: CutoffPolicy | None) -> CutoffPolicy:
    """Returns the cutoff policy that one of two arguments stands for.

    Raises:
        ValueError: If both are given, or it is no policy of this package.
    """
    if cutoff is not None and backup_workers is not None:
        raise ValueError(
            "Expected `backup_workers` or `cutoff`, because backup_workers=b is short for "
            f"cutoff=BackupWorkers(b). Received: backup_workers={backup_workers} and "
            f"cutoff={cutoff}. Leave one of them out."
        )
    if cutoff is not None:
        serialize(cutoff)  # It has to be one that the service knows.
        return cutoff
    return BackupWorkers(backup_workers) if backup_workers is not None else FullSync()


def check(
    bucket_bytes: int | None,
    transport: str,
    compression: str | None,
    history_rounds: int,
    history_bytes: int,
) -> None:
    """Checks what does not depend on the cluster; see `SyncReplicasStrategy`.

    Raises:
        ValueError: If an argument has a value that it cannot have.
    """
    if bucket_bytes is not None and not 1 <= bucket_bytes <= _MAX_BUCKET_BYTES:
        raise ValueError(
            f"`bucket_bytes` must be from 1 to {_MAX_BUCKET_BYTES}. "
            f"Received: bucket_bytes={bucket_bytes}. Leave it out if in doubt."
        )
    if transport not in TRANSPORTS:
        raise ValueError(f"`transport` must be one of {TRANSPORTS}. Received: {transport!r}.")
    if compression not in COMPRESSIONS:
        raise ValueError(
            f"`compression` must be one of {tuple(COMPRESSIONS)}. Received: {compression!r}."
        )
    if history_rounds < 0 or history_bytes < 0:
        raise ValueError(
            "`history_rounds` and `history_bytes` must be at least 0. "
            f"Received: history_rounds={history_rounds}, history_bytes={history_bytes}."
        )


def propagation(given: Propagation | str | None) -> Propagation:
    """Returns how gradients travel.

    Raises:
        TypeError: If what is given is no propagation.
    """
    if given is None:
        return FifoPropagation()
    if given == "auto":
        return AutoPropagation()
    if not isinstance(given, FifoPropagation | PriorityPropagation):
        raise TypeError(
            '`propagation` must be "auto", or a FifoPropagation or PriorityPropagation of '
            f"tf_syncdist.propagation. Received: propagation={given!r}."
        )
    return given


def check_nonfinite(nonfinite: str) -> None:
    """Checks the name of what is done with values that are not finite.

    Raises:
        ValueError: If there is no such policy.
    """
    if nonfinite not in POLICIES:
        raise ValueError(f"`nonfinite` must be one of {POLICIES}. Received: {nonfinite!r}.")


def check_limit(limit_gbps: float | None) -> None:
    """Checks a bandwidth.

    Raises:
        ValueError: If nothing could pass.
    """
    if limit_gbps is not None and not 0 < limit_gbps <= 1000:
        raise ValueError(
            f"`limit_gbps` must be above 0 and at most 1000. Received: limit_gbps={limit_gbps}."
        )


def timeline(path: str | None, role: ClusterRole) -> Timeline | None:
    """Returns what a worker records its timeline with, if it is to.

    Raises:
        FileNotFoundError: If the file's directory does not exist.
    """
    if path is None:
        return None
    index = role.task_index
    return Timeline(task_path(path, "worker", index, role.num_workers), f"worker {index}")


def record_trace(path: str | None, role: ClusterRole) -> str:
    """Returns where this task's service is to record how long workers take; empty for nowhere.

    Only the first shard knows of all exchanges.

    Raises:
        FileNotFoundError: If the file's directory does not exist.
    """
    if path is None or not _serves_first(role):
        return ""
    found = os.path.abspath(path)
    if not os.path.isdir(os.path.dirname(found)):
        raise FileNotFoundError(
            "Expected a file in a directory that exists, for the trace of the workers' run-times. "
            f"Received: record_trace={path!r}. Make the directory first."
        )
    return found


def check_planner(cutoff: CutoffPolicy, role: ClusterRole) -> None:
    """Checks that a policy can plan, where its planner is going to be.

    Raises:
        RunTimeModelError: If the file of its model cannot be used.
    """
    if role.num_workers > 1 and _serves_first(role):
        cutoff.planner(role.num_workers)


def _serves_first(role: ClusterRole) -> bool:
    """Returns whether the first process of the service is this one or its child."""
    return role.task_index == 0 and (role.is_aggregator or not role.aggregators)


def check_order(deterministic: bool, cutoff: CutoffPolicy) -> None:
    """Checks that sums can be made in the order of the workers, if they are to be.

    Raises:
        ValueError: If a round may be closed without some workers.
    """
    if deterministic and not waits_for_all(cutoff):
        raise ValueError(
            "`deterministic` needs the contributions of all workers: which ones are late is a "
            f"matter of time. Received: deterministic=True, {cutoff}. Use backup_workers=0, or "
            "leave `cutoff` out."
        )


def check_faults(min_workers: int, detection_seconds: float, num_workers: int) -> None:
    """Checks what is said of workers that fail.

    Raises:
        ValueError: If it cannot be.
    """
    if not 1 <= min_workers <= num_workers:
        raise ValueError(
            f"`min_workers` must be from 1 to the number of workers, {num_workers}. "
            f"Received: min_workers={min_workers}."
        )
    if not 0.1 <= detection_seconds <= 3600:
        raise ValueError(
            "`detection_seconds` must be from 0.1 to 3600. "
            f"Received: detection_seconds={detection_seconds}."
        )


def credentials(
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    token: str | None,
    insecure: bool,
) -> Credentials:
    """Returns what is given, or else what the environment says; see `SyncReplicasStrategy`.

    Raises:
        CredentialsError: If a file cannot be used.
    """
    found = Credentials.from_environment(
        tls_cert=tls_cert, tls_key=tls_key, tls_ca=tls_ca, token=token, insecure=insecure
    )
    found.check()
    return found
