"""The only place that touches TensorFlow's private modules.

Every import below says why no public way exists. Tried with TensorFlow 2.21 and Keras 3.15.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# `tf_convert` is what Strategy.run applies to a replica function; it has to be applied before a
# tf.function of our own hides the caller's AutoGraph status.
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.autograph.impl import api as autograph

# The batch size that a tf.data pipeline was given; public code reads element_spec only, which says
# None as soon as a last partial batch is possible.
from tensorflow.python.data.experimental.ops import distribute as data_distribute

# tf.distribute.StrategyExtended is public, but an implementation with mirrored variables is not.
from tensorflow.python.distribute import mirrored_strategy

# How variables tell what they are; tf.VariableSynchronization is public, the classes are not.
from tensorflow.python.distribute import values as distribute_values

# Whether the user has set a global seed; tf.random.set_seed has no getter.
from tensorflow.python.eager import context

_UPDATE = "_distributed_tf_update_step"

# With one device these options lead to tf.data's own iterator. MultiDeviceIterator, the default,
# crashes now and then when it is destroyed at the end of an epoch, and takes seconds to end.
_PLAIN_ITERATOR = tf.distribute.InputOptions(
    experimental_fetch_to_device=False,
    experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA,
)


class Hooks:
    """What a strategy is asked while functions are traced. The defaults are for one worker."""

    def all_reduce(self, reduce_op: tf.distribute.ReduceOp, values: list) -> list:
        """Reduces one worker's values over all workers."""
        del reduce_op
        return values

    def on_update(self, optimizer: object, variables: list) -> None:
        """Is told that an optimizer is about to update variables with reduced gradients."""

    def on_variable(self, variable: tf.Variable) -> None:
        """Is told of every variable made under the strategy's scope."""


class WorkerReplicaContext(tf.distribute.ReplicaContext):
    """The replica context of a worker with one device.

    Its merge_call is inline. MirroredStrategy's threads refuse a merge_call inside tf.cond, which
    breaks gradient accumulation, EMA overwriting and loss scaling of Keras' optimizers.
    """

    def __init__(self, strategy: tf.distribute.Strategy, replica_id: int, hooks: Hooks) -> None:
        super().__init__(strategy, replica_id)
        self._hooks = hooks

    def merge_call(self, merge_fn: Callable, args: tuple = (), kwargs: dict | None = None) -> Any:
        optimizer = getattr(merge_fn, "__self__", None)
        if optimizer is not None and getattr(merge_fn, "__name__", "") == _UPDATE:
            self._hooks.on_update(optimizer, [v for g, v in args[0] if g is not None])
        return super().merge_call(merge_fn, args, kwargs)

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        del options
        if isinstance(reduce_op, str):
            reduce_op = tf.distribute.ReduceOp(reduce_op.upper())

        @tf.custom_gradient
        def reduce(*values: tf.Tensor) -> tuple:
            reduced = self._hooks.all_reduce(reduce_op, list(values))
            # The gradient of an all-sum is itself an all-sum.
            return reduced, lambda *upstream: self.all_reduce(reduce_op, list(upstream))

        flat = [tf.convert_to_tensor(v) for v in tf.nest.flatten(value)]
        reduced = reduce(*flat) if flat else []
        reduced = list(reduced) if isinstance(reduced, list | tuple) else [reduced]
        return tf.nest.pack_sequence_as(value, reduced)


class WorkerExtended(mirrored_strategy.MirroredExtended):
    """MirroredStrategy's machinery for the devices of one worker.

    Args:
        container: The strategy.
        devices: Devices of this worker.
        first_replica_id: Id of this worker's first replica in the whole job.
        hooks: See `Hooks`.
    """

    def __init__(
        self,
        container: tf.distribute.Strategy,
        devices: Sequence[str],
        first_replica_id: int,
        hooks: Hooks,
    ) -> None:
        self._first_replica_id = first_replica_id
        self._hooks = hooks
        logger = tf.get_logger()
        level = logger.level
        logger.setLevel("WARNING")  # MirroredStrategy logs its devices at INFO.
        try:
            one_device = len(devices) == 1
            ops = tf.distribute.ReductionToOneDevice() if one_device else None
            super().__init__(container, devices=list(devices), cross_device_ops=ops)
        finally:
            logger.setLevel(level)

    def _call_for_each_replica(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        if len(self.worker_devices) > 1:
            return super()._call_for_each_replica(fn, args, kwargs)
        strategy = self._container_strategy()
        with WorkerReplicaContext(strategy, self._first_replica_id, self._hooks):
            with tf.device(self.worker_devices[0]):
                return fn(*args, **kwargs)

    def _create_variable(self, next_creator: Callable, **kwargs: Any) -> tf.Variable:
        variable = super()._create_variable(next_creator, **kwargs)
        self._hooks.on_variable(variable)
        return variable

    def _get_local_replica_id(self, replica_id_in_sync_group: Any) -> Any:
        if isinstance(replica_id_in_sync_group, int):
            return replica_id_in_sync_group - self._first_replica_id
        return replica_id_in_sync_group

    def _get_replica_id_in_sync_group(self, replica_id: Any) -> Any:
        return replica_id + self._first_replica_id

    def distribute_from_function(
        self, fn: Callable, context: tf.distribute.InputContext, options: Any
    ) -> Any:
        """Like `_distribute_datasets_from_function`, with the true input context for `fn`."""
        if options is None and len(self.worker_devices) == 1:
            options = _PLAIN_ITERATOR
        return super()._distribute_datasets_from_function(lambda _: fn(context), options)

    def _experimental_distribute_dataset(self, dataset: tf.data.Dataset, options: Any) -> Any:
        if options is None and len(self.worker_devices) == 1:
            return super()._distribute_datasets_from_function(lambda _: dataset, _PLAIN_ITERATOR)
        return super()._experimental_distribute_dataset(dataset, options)


def local_devices() -> list[str]:
    """Returns this process's GPUs, or else its CPU devices."""
    gpus = tf.config.list_logical_devices("GPU")
    return [d.name for d in gpus or tf.config.list_logical_devices("CPU")]


def convert(fn: Callable) -> Callable:
    """Returns a replica function converted by AutoGraph as its caller's status asks for."""
    return autograph.tf_convert(fn, ag_ctx.control_status_ctx(), convert_by_default=False)


def own_code(method: Callable) -> Callable:
    """Keeps AutoGraph from converting a method of ours that a tf.function calls.

    Unlike tf.autograph.experimental.do_not_convert, it leaves the status as it is for the user's
    functions that the method calls.
    """
    return autograph.autograph_artifact(method)


def is_tf_function(fn: Callable) -> bool:
    """Returns whether `fn` is a tf.function."""
    return hasattr(fn, "python_function") and hasattr(fn, "get_concrete_function")


def with_python_function(fn: Callable, python_function: Callable) -> Callable:
    """Returns a tf.function with all options of `fn` around another Python function."""
    return fn._clone(python_function=python_function)


def is_sync_on_read(value: object) -> bool:
    """Returns whether a value is a metric-like variable, local to replicas until it is read."""
    return isinstance(value, distribute_values.SyncOnReadVariable)


def components(variable: tf.Variable) -> tuple[tf.Variable, ...]:
    """Returns a distributed variable's copies, one per device of this worker."""
    return tuple(getattr(variable, "values", None) or (variable,))


def static_batch_size(dataset: tf.data.Dataset) -> int | None:
    """Returns the batch size that a dataset was given, or `None` if it does not tell."""
    sizes = {
        spec.shape[0]
        for spec in tf.nest.flatten(dataset.element_spec)
        if getattr(getattr(spec, "shape", None), "rank", None)
    }
    if len(sizes) == 1 and None not in sizes:
        return sizes.pop()
    size = int(data_distribute.compute_batch_size(dataset).numpy())
    return size if size > 0 else None


def global_seed_is_set() -> bool:
    """Returns whether the user has called tf.random.set_seed."""
    return context.global_seed() is not None


def last_call() -> tf.Operation | None:
    """Returns the operation by which a concrete function was just called in the current graph.

    A control dependency on it waits for everything that the function does, while one on its
    outputs waits for these only.
    """
    for op in reversed(tf.compat.v1.get_default_graph().get_operations()):
        if op.type in ("StatefulPartitionedCall", "PartitionedCall"):
            return op
    return None
