"""The only place that touches private parts of TensorFlow and Keras.

Every use below says why no public way exists. Tried with TensorFlow 2.18 to 2.21 and Keras 3.10 to
3.15; with another version that has moved one of them, the error names what has moved.
"""

import functools
import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_syncdist.errors import UnsupportedVersionError
from tf_syncdist.strategies import loss_scaling
from tf_syncdist.strategies.counted_batches import CountedBatches
from tf_syncdist.strategies.hooks import Hooks


def _private(module: str, name: str) -> Any:
    """Returns something private of TensorFlow, or says that it has moved."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UnsupportedVersionError(
            f"tf_syncdist uses `{module}.{name}`, which TensorFlow {tf.__version__} does not "
            "have. Install a version of TensorFlow that setup.cfg of tf_syncdist names."
        ) from None


def _seam(owner: Any, name: str) -> str:
    """Returns the name of something private of Keras, or says that it has moved."""
    if not hasattr(owner, name):
        owner = owner if isinstance(owner, type) else type(owner)
        raise UnsupportedVersionError(
            f"tf_syncdist uses `{owner.__module__}.{owner.__name__}.{name}`, which Keras "
            f"{keras.__version__} does not have. Install a version of Keras that setup.cfg of "
            "tf_syncdist names."
        )
    return name


# `tf_convert` is what Strategy.run applies to a replica function; it has to be applied before a
# tf.function of our own hides the caller's AutoGraph status.
_AUTOGRAPH = "tensorflow.python.autograph"
_control_status_ctx = _private(f"{_AUTOGRAPH}.core.ag_ctx", "control_status_ctx")
_tf_convert = _private(f"{_AUTOGRAPH}.impl.api", "tf_convert")
_autograph_artifact = _private(f"{_AUTOGRAPH}.impl.api", "autograph_artifact")

# The batch size that a tf.data pipeline was given; public code reads element_spec only, which says
# None as soon as a last partial batch is possible. And sharding by files, which a user can ask for.
_DATA = "tensorflow.python.data.experimental.ops.distribute"
_compute_batch_size = _private(_DATA, "compute_batch_size")
_AutoShardDataset = _private(_DATA, "_AutoShardDataset")

# tf.distribute.StrategyExtended is public, but an implementation with mirrored variables is not.
_MirroredExtended = _private("tensorflow.python.distribute.mirrored_strategy", "MirroredExtended")

# PerReplica values cannot be made in a public way, nor can nests of them be taken apart.
_regroup = _private("tensorflow.python.distribute.distribute_utils", "regroup")
_select_replica = _private("tensorflow.python.distribute.distribute_utils", "select_replica")
_PerReplicaSpec = _private("tensorflow.python.distribute.values", "PerReplicaSpec")

# How variables tell what they are; tf.VariableSynchronization is public, the classes are not.
_SyncOnReadVariable = _private("tensorflow.python.distribute.values", "SyncOnReadVariable")
MirroredVariable = _private("tensorflow.python.distribute.values", "MirroredVariable")

# A function that was traced once can be called with the variables of any learner.
_ConcreteFunction = _private(
    "tensorflow.python.eager.polymorphic_function.concrete_function", "ConcreteFunction"
)
_CALL_FLAT = _seam(_ConcreteFunction, "_call_flat")

# Keras takes the number of batches of an epoch from the user's dataset, and asks no strategy.
_EpochIterator = _private("keras.src.backend.tensorflow.trainer", "TFEpochIterator")

# Whether a graph is one that XLA compiles; it has no clock.
_in_xla = _private("tensorflow.python.ops.control_flow_util", "GraphOrParentsInXlaContext")

# Whether Keras only wants to know shapes; it reads variables in a graph that nobody executes.
in_symbolic_scope = _private("keras.src.backend.common.symbolic_scope", "in_symbolic_scope")

# Whether the user has set a global seed; tf.random.set_seed has no getter.
_global_seed = _private("tensorflow.python.eager.context", "global_seed")

# Keras' optimizers say in no public way that they are about to update variables, or that they ask
# whether gradients are finite; the names of the methods that they hand to tf.distribute do.
_UPDATE_STEP = _seam(keras.optimizers.Optimizer, "_distributed_tf_update_step")
_CHECK_FINITE = _seam(keras.optimizers.LossScaleOptimizer, "check_finite")
_APPLY_FINITE = _seam(keras.optimizers.LossScaleOptimizer, "_stateful_handle_finite_grads")

# With one device these options lead to tf.data's own iterator. MultiDeviceIterator, the default,
# crashes now and then when it is destroyed at the end of an epoch, and takes seconds to end.
_PLAIN_ITERATOR = tf.distribute.InputOptions(
    experimental_fetch_to_device=False,
    experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA,
)


class WorkerReplicaContext(tf.distribute.ReplicaContext):
    """The replica context of one device of a worker.

    With one device its merge_call is inline. MirroredStrategy's threads refuse a merge_call inside
    tf.cond, which breaks gradient accumulation and EMA overwriting of Keras' optimizers.

    Args:
        strategy: The strategy.
        replica_id: Id of the replica in the whole job.
        hooks: See `Hooks`.
        inner: The context of MirroredStrategy's thread, where a worker has several devices.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        replica_id: int,
        hooks: Hooks,
        inner: tf.distribute.ReplicaContext | None = None,
    ) -> None:
        super().__init__(strategy, replica_id)
        self._hooks = hooks
        self._inner = inner

    def merge_call(self, merge_fn: Callable, args: tuple = (), kwargs: dict | None = None) -> Any:
        optimizer = getattr(merge_fn, "__self__", None)
        if optimizer is None or getattr(merge_fn, "__name__", "") != _UPDATE_STEP:
            return self._merge(merge_fn, args, kwargs)

        def update(strategy: tf.distribute.Strategy, pairs: Any, learning_rate: Any) -> Any:
            pairs = [(g, v) for g, v in pairs if g is not None]
            gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]

            def apply(gradients: list, learning_rate: Any, numbers: Sequence[int] = ()) -> Any:
                chosen = [variables[n] for n in numbers] or variables
                return merge_fn(strategy, list(zip(gradients, chosen, strict=True)), learning_rate)

            return self._hooks.update(optimizer, variables, gradients, learning_rate, apply)

        return self._merge(update, args, kwargs)

    def _merge(self, merge_fn: Callable, args: tuple, kwargs: dict | None) -> Any:
        if self._inner is None:
            return _select_replica(0, super().merge_call(merge_fn, args, kwargs))
        try:
            return self._inner._merge_call(merge_fn, args, kwargs or {})
        except RuntimeError as e:
            if "`merge_call` called while defining a new graph" not in str(e):
                raise
            raise NotImplementedError(
                "Expected one device per worker for a training function that updates or reduces "
                "inside of a condition or loop, such as an optimizer with "
                "`gradient_accumulation_steps` or `ema_overwrite_frequency`. Received: "
                f"{len(self.strategy.extended.worker_devices)} devices. Start one worker per "
                "device, or leave the option out."
            ) from e

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        if not self._hooks.leaves_worker():
            alone = self._inner is None
            return value if alone else super().all_reduce(reduce_op, value, options)
        if isinstance(reduce_op, str):
            reduce_op = tf.distribute.ReduceOp(reduce_op.upper())

        @tf.custom_gradient
        def reduce(*values: tf.Tensor) -> tuple:
            def gradient(*upstream: tf.Tensor) -> Any:
                self._hooks.on_gradient_of_exchange()
                # The gradient of an all-sum is itself an all-sum.
                return self.all_reduce(reduce_op, list(upstream))

            return self._reduce(reduce_op, values), gradient

        flat = tf.nest.flatten(value)
        if self._inner is None and any(map(_is_table, flat)):
            # They come from a gradient, so nobody differentiates further.
            flat = [v if _is_table(v) else tf.convert_to_tensor(v) for v in flat]
            return tf.nest.pack_sequence_as(value, self._hooks.all_reduce(reduce_op, flat))
        flat = [tf.convert_to_tensor(v) for v in flat]
        reduced = reduce(*flat) if flat else []
        reduced = list(reduced) if isinstance(reduced, list | tuple) else [reduced]
        return tf.nest.pack_sequence_as(value, reduced)

    def all_gather(self, value: Any, axis: int, options: Any = None) -> Any:
        if self._hooks.leaves_worker():
            raise NotImplementedError(
                "Expected no `all_gather` in a function of several workers, because a round closes "
                "without the values of late workers. Use `all_reduce`."
            )
        return super().all_gather(value, axis, options)

    def _reduce(self, reduce_op: tf.distribute.ReduceOp, values: Sequence[tf.Tensor]) -> list:
        if self._inner is None:
            return self._hooks.all_reduce(reduce_op, list(values))

        def reduce(strategy: tf.distribute.Strategy, *grouped: Any) -> list:
            home = strategy.extended.worker_devices[0]
            total = [
                tf.identity(strategy.extended.reduce_to(tf.distribute.ReduceOp.SUM, v, home))
                for v in grouped
            ]
            return self._hooks.all_reduce(reduce_op, total)

        return self._merge(reduce, tuple(values), {})


def _is_table(value: Any) -> bool:
    """Returns whether a value is rows of a table whose shape is known."""
    return (
        isinstance(value, tf.IndexedSlices)
        and not tf.executing_eagerly()
        and value.shape.rank is not None
        and value.shape.rank > 1
        and value.shape.is_fully_defined()
    )


class WorkerExtended(_MirroredExtended):
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
        self._lifted_functions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        logger = tf.get_logger()
        level = logger.level
        logger.setLevel("WARNING")  # MirroredStrategy logs its devices at INFO.
        try:
            # Collectives, the default, fail on CPUs within a loop (steps_per_execution > 1).
            collective = len(devices) > 1 and all("GPU" in d for d in devices)
            ops = None if collective else tf.distribute.ReductionToOneDevice()
            super().__init__(container, devices=list(devices), cross_device_ops=ops)
        finally:
            logger.setLevel(level)

    def _call_for_each_replica(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        optimizer = getattr(fn, "__self__", None)
        name = getattr(fn, "__name__", "")
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        # With several devices there is no accumulation; it is refused further down.
        alone = len(self.worker_devices) == 1
        if alone and scales and name == _APPLY_FINITE and loss_scaling.accumulates(optimizer):
            args = (loss_scaling.zero_unless_finite(optimizer, args[0]), *args[1:])
        result = self._call_replicas(fn, args, kwargs)
        if scales and name == _CHECK_FINITE:
            # Keras asks the first replica only, and before gradients are reduced.
            finite = tf.reduce_all(self._container_strategy().experimental_local_results(result))
            return self._hooks.all_finite(optimizer, finite)
        return result

    def _call_replicas(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        strategy = self._container_strategy()
        if len(self.worker_devices) == 1:
            args, kwargs = _select_replica(0, (args, kwargs))
            with WorkerReplicaContext(strategy, self._first_replica_id, self._hooks):
                with tf.device(self.worker_devices[0]):
                    return fn(*args, **kwargs)
        if is_tf_function(fn):
            return self._lifted(fn)(*args, **kwargs)

        carried = self._hooks.carried()

        @own_code
        def replica(*args: Any, **kwargs: Any) -> Any:
            inner = tf.distribute.get_replica_context()
            replica_id = inner._replica_id_in_sync_group
            context = WorkerReplicaContext(strategy, replica_id, self._hooks, inner)
            with carried(), context:
                return fn(*args, **kwargs)

        return super()._call_for_each_replica(replica, args, kwargs)

    def _lifted(self, fn: Callable) -> Callable:
        """Puts the replicas inside of a tf.function that was given as replica function."""
        lifted = self._lifted_functions.get(fn)
        if lifted is None:
            python_function = fn.python_function

            def call(*args: Any, **kwargs: Any) -> Any:
                converted = convert(python_function)
                return self._call_replicas(converted, args, kwargs)

            lifted = self._lifted_functions[fn] = with_python_function(fn, call)
        return lifted

    def _create_variable(self, next_creator: Callable, **kwargs: Any) -> tf.Variable:
        variable = super()._create_variable(next_creator, **kwargs)
        self._hooks.on_variable(variable)
        return variable

    def _update(self, var: Any, fn: Callable, args: tuple, kwargs: dict, group: bool) -> Any:
        found = super()._update(var, fn, args, kwargs, group)
        self._hooks.on_update(var, found)
        return found

    def _get_local_replica_id(self, replica_id_in_sync_group: Any) -> Any:
        if isinstance(replica_id_in_sync_group, int):
            return replica_id_in_sync_group - self._first_replica_id
        return replica_id_in_sync_group

    def _get_replica_id_in_sync_group(self, replica_id: Any) -> Any:
        return replica_id + self._first_replica_id

    def _distribute_datasets_from_function(self, fn: Callable, options: Any) -> Any:
        if options is None and len(self.worker_devices) == 1:
            options = _PLAIN_ITERATOR
        return super()._distribute_datasets_from_function(fn, options)

    def _experimental_distribute_dataset(self, dataset: tf.data.Dataset, options: Any) -> Any:
        if options is None and len(self.worker_devices) == 1:
            return self._distribute_datasets_from_function(lambda _: dataset, options)
        return super()._experimental_distribute_dataset(dataset, options)

    def _experimental_distribute_values_from_function(self, value_fn: Callable) -> Any:
        """Like MirroredStrategy's, with ids that are unique in the job."""
        strategy = self._container_strategy()
        first, devices = self._first_replica_id, self.worker_devices
        contexts = [
            tf.distribute.experimental.ValueContext(first + i, strategy.num_replicas_in_job)
            for i in range(len(devices))
        ]
        return _regroup([value_fn(c) for c in contexts], always_wrap=True)


def convert(fn: Callable) -> Callable:
    """Returns a replica function converted by AutoGraph as its caller's status asks for."""
    return _tf_convert(fn, _control_status_ctx(), convert_by_default=False)


def own_code(method: Callable) -> Callable:
    """Keeps AutoGraph from converting a method of ours that a tf.function calls.

    Unlike tf.autograph.experimental.do_not_convert, it leaves the status as it is for the user's
    functions that the method calls.
    """
    return _autograph_artifact(method)


def is_tf_function(fn: Callable) -> bool:
    """Returns whether `fn` is a tf.function."""
    return hasattr(fn, "python_function") and hasattr(fn, "get_concrete_function")


def with_python_function(fn: Callable, python_function: Callable) -> Callable:
    """Returns a tf.function with all options of `fn` around another Python function."""
    return fn._clone(python_function=python_function)


def is_sync_on_read(value: object) -> bool:
    """Returns whether a value is a metric-like variable, local to replicas until it is read."""
    return isinstance(value, _SyncOnReadVariable)


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
    size = int(_compute_batch_size(dataset).numpy())
    return size if size > 0 else None


def is_compiled() -> bool:
    """Returns whether XLA is going to compile what is emitted now."""
    return not tf.executing_eagerly() and _in_xla(tf.compat.v1.get_default_graph())


def is_validation(arguments: dict[str, Any]) -> bool:
    """Returns whether `evaluate` is called by `fit`; only this says so (Keras 3.10 to 3.15)."""
    return bool(arguments.get("kwargs", {}).get("_use_cached_eval_dataset"))


def global_seed_is_set() -> bool:
    """Returns whether the user has called tf.random.set_seed."""
    return _global_seed() is not None


def add_component(variable: tf.Variable, copy: tf.Variable) -> None:
    """Gives a metric's variable one more copy; read, it is the sum or mean of all."""
    variable._values = (*variable._values, copy)


def keep_components(variable: tf.Variable, count: int) -> None:
    """Leaves a metric's variable as many copies."""
    variable._values = variable._values[:count]


def call_with(function: Any, tensors: Sequence[tf.Tensor], captured: Sequence[tf.Tensor]) -> Any:
    """Calls a concrete function with other captured tensors than those it was traced with."""
    return getattr(function, _CALL_FLAT)(list(tensors), list(captured))


def part_of(number: int, values: Any) -> Any:
    """Returns a nest with one value in the place of each PerReplica value."""
    return _select_replica(number, values)


def per_replica(values: Sequence[Any]) -> Any:
    """Returns nests, one for each device of a worker, as one nest of PerReplica values."""
    return _regroup(tuple(values), always_wrap=True)


def per_replica_spec(spec: Any, count: int) -> Any:
    """Returns what nests of PerReplica values are, each with so many parts of one specification."""
    return tf.nest.map_structure(lambda s: _PerReplicaSpec(*[s] * count), spec)


def shard_by_files(dataset: tf.data.Dataset, num_workers: int, worker: int) -> tf.data.Dataset:
    """Returns a worker's share as TensorFlow's auto-sharding makes it."""
    return _AutoShardDataset(dataset, num_workers, worker, num_workers)


def trained_by(optimizer: object) -> list:
    """Returns the Keras variables that an optimizer trains."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # Its own list is empty before Keras 3.12.
        return trained_by(optimizer.inner_optimizer)
    return list(getattr(optimizer, _seam(optimizer, "_trainable_variables")))


def averages_of(optimizer: object) -> list:
    """Returns the Keras variables in which an optimizer averages what it trains over time."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return averages_of(optimizer.inner_optimizer)
    if not getattr(optimizer, "use_ema", False):
        return []
    return list(getattr(optimizer, _seam(optimizer, "_model_variables_moving_average")))


def builds_from_input(model: keras.Model) -> bool:
    """Returns whether Keras looks at a first batch before it trains, as models of a scope need."""
    return getattr(model, _seam(model, "_distribute_strategy")) is not None


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Lets a fit that is about to begin start with an epoch, `None` for the one it was given.

    Keras keeps it for later fits.

    `fit` reads the private attribute after `on_train_begin`, as Keras' own BackupAndRestore relies
    on; there is no public way from a callback. Tried with Keras 3.10 and 3.15.
    """
    model._initial_epoch = epoch


def build(model: keras.Model, batch: Any) -> None:
    """Builds a model with its metrics and its optimizer, as `fit` does where it begins."""
    with model.distribute_strategy.scope():
        getattr(model, _seam(model, "_symbolic_build"))(data_batch=batch)


def count_batches_of_shares() -> None:
    """Lets Keras ask a distributed dataset how many batches an epoch has; done once.

    Where a run takes several of the user's batches, an epoch has fewer runs than batches. A dataset
    tells by an attribute `batches_per_epoch`; or, if that is `None` because only Keras knows how
    many batches there are, by how many of them a run takes, `batches_per_run`.
    """
    original = _EpochIterator.__init__
    if hasattr(original, "_tf_syncdist"):
        return

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        count = getattr(self._distributed_dataset, "batches_per_epoch", None)
        each = getattr(self._distributed_dataset, "batches_per_run", 1)
        if count is None and each > 1 and self._num_batches is not None:
            count = self._num_batches // each
        if count is not None:
            self.data_adapter = CountedBatches(self.data_adapter, count)
            self._num_batches = count

    initialize._tf_syncdist = True
    _EpochIterator.__init__ = initialize
