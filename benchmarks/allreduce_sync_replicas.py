"""One process of benchmarks.allreduce under tf.compat.v1.train.SyncReplicasOptimizer.

The `ps` task holds the variables. A worker's exchange is one run of the training operation: it
reads all variables, computes gradients that depend on them, sends them, and waits until the `ps`
has applied their mean, which is one global step.
"""

from __future__ import annotations

import math

import tensorflow as tf

from benchmarks import allreduce_child as child

v1 = tf.compat.v1

_SHRINKAGE = 1e-3
_TOLERANCE = 1e-3


def _measure() -> child.Result:
    """Takes part as the process's task says; a `ps` serves until it is killed."""
    task = child.task()
    server = v1.train.Server(
        tf.train.ClusterSpec(task.cluster), job_name=task.kind, task_index=task.index
    )
    if task.kind == "ps":
        server.join()
    with tf.Graph().as_default():
        return _train(task, server)


def _train(task: child.Task, server: tf.distribute.Server) -> child.Result:
    """Runs all global steps of a worker and returns the seconds of each."""
    own_device = f"/job:worker/task:{task.index}"
    with v1.device(
        v1.train.replica_device_setter(
            worker_device=own_device, cluster=tf.train.ClusterSpec(task.cluster)
        )
    ):
        variables = [
            v1.get_variable(
                f"v{number}",
                shape,
                initializer=v1.ones_initializer(),
                use_resource=False,
            )
            for number, shape in enumerate(child.shapes())
        ]
        global_step = v1.train.get_or_create_global_step()
        optimizer = v1.train.SyncReplicasOptimizer(
            v1.train.GradientDescentOptimizer(1.0),
            replicas_to_aggregate=task.num_workers,
            total_num_replicas=task.num_workers,
        )
        gradients = [variable * _SHRINKAGE for variable in variables]
        train = optimizer.apply_gradients(
            list(zip(gradients, variables, strict=True)), global_step=global_step
        )
        ends = [tf.reshape(variable, [-1])[-1] for variable in variables]
    is_chief = task.index == 0
    # Without spare tokens nobody begins a step before the one before is applied.
    hook = optimizer.make_session_run_hook(is_chief, num_tokens=0)
    with v1.train.MonitoredTrainingSession(
        master=server.target,
        is_chief=is_chief,
        hooks=[hook],
        # So that a worker which has done its steps can leave before the others have.
        config=v1.ConfigProto(device_filters=["/job:ps", own_device]),
        log_step_count_steps=None,
        # The chief's thread that applies gradients is waiting for more of them for ever.
        stop_grace_period_secs=1,
    ) as session:
        result = child.time_rounds(lambda _: session.run(train))
        steps, values = session.run([global_step, ends])
    _check(int(steps), [float(value) for value in values])
    return result


def _check(steps: int, values: list[float]) -> None:
    """Raises an error if not every step took one mean gradient of each worker."""
    wanted = child.WARMUP_ROUNDS.value + child.ROUNDS.value
    value = (1 - _SHRINKAGE) ** wanted
    if steps != wanted or any(
        not math.isclose(found, value, rel_tol=_TOLERANCE) for found in values
    ):
        raise RuntimeError(
            f"Expected {wanted} global steps and all variables to be {value}, got {steps} and "
            f"{sorted(set(values))[:5]}; look for the error first."
        )


if __name__ == "__main__":
    child.run(_measure)
