"""Looks at values on several replicas, and at what workers have in common in a loop."""

from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

DEVICES = task.ARGUMENTS["devices"]
STEPS = 4
PER_REPLICA = 3

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES)
resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
strategy = tf_syncdist.SyncReplicasStrategy(
    backup_workers=task.ARGUMENTS["backup_workers"],
    cluster_resolver=resolver,
    **task.patience(task.ARGUMENTS["backup_workers"]),
)
worker = strategy.worker_index


def plain(value: Any) -> Any:
    """Returns a nest of tensors as lists and numbers."""
    return tf.nest.map_structure(lambda v: np.asarray(v).tolist(), value)


def local(value: Any) -> list:
    return [np.asarray(v).tolist() for v in strategy.experimental_local_results(value)]


def identity() -> dict[str, Any]:
    contexts = []

    def value(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        contexts.append([context.replica_id_in_sync_group, context.num_replicas_in_sync])
        return tf.constant(context.replica_id_in_sync_group * 10)

    def replica_id() -> tf.Tensor:
        return tf.identity(tf.distribute.get_replica_context().replica_id_in_sync_group)

    distributed = strategy.experimental_distribute_values_from_function(value)
    return {
        "num_replicas_in_sync": strategy.num_replicas_in_sync,
        "num_workers": strategy.num_workers,
        "worker_index": strategy.worker_index,
        "is_chief": strategy.is_chief,
        "resolver_is_kept": strategy.cluster_resolver is resolver,
        "resolver_task": [strategy.cluster_resolver.task_type, strategy.cluster_resolver.task_id],
        "contexts": contexts,
        "distributed": local(distributed),
        "passed_through": local(strategy.run(lambda v: v + 1, args=(distributed,))),
        "ids_eagerly": local(strategy.run(replica_id)),
        "ids_in_function": local(tf.function(lambda: strategy.run(replica_id))()),
    }


def combined() -> dict[str, Any]:
    def make(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        # Each replica has one row more than the one before.
        own = context.replica_id_in_sync_group
        return tf.fill((own + 1, 2), float(own + 1))

    rows = strategy.experimental_distribute_values_from_function(make)
    one = strategy.run(lambda v: tf.reduce_max(v), args=(rows,))
    nest = {"a": one, "b": [one, (one,)]}

    @tf.function
    def in_function(rows: Any) -> Any:
        return (
            strategy.gather(rows, axis=0),
            strategy.reduce("MEAN", rows, axis=0),
            strategy.reduce("SUM", strategy.run(lambda v: tf.reduce_max(v), args=(rows,)), None),
        )

    return {
        "gathered": plain(strategy.gather(rows, axis=0)),
        "sum": plain(strategy.reduce("SUM", one, axis=None)),
        "mean": plain(strategy.reduce("MEAN", one, axis=None)),
        "sum_of_axis": plain(strategy.reduce("SUM", rows, axis=0)),
        "mean_of_axis": plain(strategy.reduce("MEAN", rows, axis=0)),
        "sum_of_nest": plain(strategy.reduce("SUM", nest, axis=None)),
        "mean_of_nest_and_axis": plain(strategy.reduce("MEAN", {"a": rows}, axis=0)),
        "in_function": plain(in_function(rows)),
    }


def synchronised() -> dict[str, Any]:
    """Trains with metrics and statistics, without reading them before `synchronize`."""
    keras.utils.set_random_seed(3)
    with strategy.scope():
        normalise = keras.layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((2,)), normalise, keras.layers.Dense(1)])
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        seen, maximum = keras.metrics.Mean(), keras.metrics.Sum()

    def replica_step(x: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(model(x, training=True) ** 2) / strategy.num_replicas_in_sync
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        seen.update_state(x)
        maximum.update_state(tf.reduce_max(x))

    @tf.function
    def step(x: Any) -> None:
        strategy.run(replica_step, args=(x,))

    def batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # What a worker sees is around its index.
        size = (STEPS + 2) * PER_REPLICA * DEVICES
        x = np.random.RandomState(worker).randn(size, 2).astype("float32") + worker
        return tf.data.Dataset.from_tensor_slices(x).batch(PER_REPLICA)

    def held() -> dict[str, Any]:
        return {
            "total": local(seen.total.value),
            "count": local(seen.count.value),
            "sum": local(maximum.total.value),
            "mean": local(normalise.moving_mean.value),
            "variance": local(normalise.moving_variance.value),
        }

    def read() -> list[float]:
        return [float(seen.result()), float(maximum.result())]

    data = iter(strategy.distribute_datasets_from_function(batches))
    for _ in range(STEPS):
        step(next(data))
    before = held()
    strategy.synchronize()
    results = {"before": before, "after": held(), "read": read()}
    strategy.synchronize()
    results["read_again"] = read()
    for metric in (seen, maximum):
        metric.reset_state()
    results["read_reset"] = read()
    for _ in range(2):
        step(next(data))
    results["second"] = held()
    strategy.synchronize()
    results["read_second"] = read()
    results["statistics_sha256"] = tf_syncdist.variables_sha256(model.non_trainable_variables)
    results["weights_sha256"] = tf_syncdist.variables_sha256(model.trainable_variables)
    return results


results = {"identity": identity(), "combined": combined()}
if not task.ARGUMENTS["backup_workers"]:
    results["synchronised"] = synchronised()
results["rounds"] = strategy.local_report().rounds
task.meet(strategy, "end")
task.write(worker, results)
