"""What happens in a training run: its exchanges and updates are found while it is traced.

`graph_runs.run_in_graph` builds the graph of a run from what is found here; runs without a graph
are executed by `Runs.run_eagerly`.
"""

import contextlib
import functools
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_syncdist.propagation.slices import TensorSpec
from tf_syncdist.strategies import adapter, traces, watched
from tf_syncdist.strategies.controller import Mode, RunController
from tf_syncdist.strategies.deferred_updates import DeferredUpdate, parts
from tf_syncdist.strategies.devices import operation_threads
from tf_syncdist.strategies.hooks import Hooks
from tf_syncdist.strategies.replays import apply_updates, foreign_change
from tf_syncdist.strategies.site import Site
from tf_syncdist.strategies.variables import VariableRegistry, is_local


class Runs(Hooks):
    """Turns `strategy.run(fn)` into runs.

    Args:
        strategy: The strategy.
        replicas: Number of replicas over which a loss is averaged: N x devices.
        worker: Index of this worker.
        needs_all: Whether a round needs the contributions of all workers.
        stays_local: Tells whether exchanges stay within this worker now (evaluate and predict).
        registry: Remembers the variables made under the strategy's scope.
        on_traced: Is told of every site, once it is known what it does.
        compression: What float32 values become for the way.
        defers: Whether updates are made in the next run, where that can be.

    Attributes:
        has_learners: Whether each worker has learners with models of their own.
    """

    has_learners = False

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        replicas: int,
        worker: int,
        needs_all: bool,
        stays_local: Callable[[], bool],
        registry: VariableRegistry,
        on_traced: Callable[[Site], None],
        compression: tf.DType | None = None,
        defers: bool = False,
    ) -> None:
        self.watches_variables = defers
        self.controller: RunController | None = None
        self.strategy = strategy
        self.stays_local = stays_local
        self.on_traced = on_traced
        self._replicas = replicas
        self._worker = worker
        self._needs_all = needs_all
        self._compression = compression
        self.registry = registry
        self._current = threading.local()
        self._outside = False
        self._eager_sites: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        with tf.init_scope():
            # Orders the runs of a graph: every run reads it first and writes it last.
            self.token = tf.Variable(0, dtype=tf.int64, trainable=False, name="tf_syncdist_run")
            # When the first and the last run ended, for a single worker without service.
            self._ends = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)

    def count_alone(self) -> None:
        """Counts a run of a worker without service."""
        self.token.assign_add(1, read_value=False)
        if adapter.is_compiled():
            return
        now = tf.timestamp()
        self._ends.assign([tf.where(self._ends[0] > 0, self._ends[0], now), now])

    def forget_count(self) -> None:
        """Begins to count anew."""
        self.token.assign(0)
        self._ends.assign([0.0, 0.0])

    def counted_alone(self) -> tuple[int, float]:
        """Returns a single worker's updates, and the seconds from the first to the last."""
        first, last = self._ends.numpy()
        return int(self.token.numpy()), float(last - first)

    @property
    def site(self) -> Site | None:
        """The site that is being traced or executed on this thread."""
        return getattr(self._current, "site", None)

    @contextlib.contextmanager
    def at(self, site: Site) -> Iterator[None]:
        """Makes a site the one that is traced or executed on this thread."""
        before, self._current.site = self.site, site
        try:
            yield
        finally:
            self._current.site = before

    def fold_seed(self) -> None:
        """Gives the graph that is being built a seed of this worker's own, if it has one at all.

        The global seed is common to the job, for the order of the input.
        """
        seed = tf.compat.v1.get_default_graph().seed
        if seed is not None and self._worker:
            digest = hashlib.blake2b(f"{seed} {self._worker}".encode(), digest_size=4).digest()
            tf.random.set_seed(int.from_bytes(digest, "little") >> 1)

    def run_eagerly(
        self, given: Callable, fn: Callable[[], Any], training: bool, found: bool = False
    ) -> Any:
        """Executes one run of a replica function without a graph.

        Args:
            given: The function as the user gave it, which tells one place from another.
            fn: Executes it.
            training: Whether it is known to be Keras' own training step.
            found: Whether it is known to have an exchange.
        """
        # A bound method is made anew for each call; its object and its function stay.
        owner, function = getattr(given, "__self__", given), getattr(given, "__func__", given)
        sites = self._eager_sites.setdefault(owner, weakref.WeakKeyDictionary())
        site = sites.get(function)
        if site is None and (training or found):
            site = sites[function] = Site()
        if site is None:
            return self._try_eagerly(given, fn)
        mode = self.controller.begin(site)
        with self.at(site):
            if mode is Mode.COMPUTE:
                self._compute_eagerly(site, fn, training)
            elif mode is Mode.REPLAY:
                site.begin_replay()
                apply_updates(self.strategy, site.updates)
                site.replaying = False
        self.controller.finish(site, [])
        return site.eager_outputs

    def _compute_eagerly(self, site: Site, fn: Callable[[], Any], training: bool) -> None:
        earlier = site.updates
        before = {} if earlier else self._foreign()
        site.reset()
        site.eager_outputs = fn()
        regular = len(site.exchanges) == len(site.updates) + len(site.scalers)
        # Runs that accumulate gradients, or whose gradients overflow, update nothing.
        site.updates = site.updates or earlier
        # Only now is it known which optimizers there are, and what they hold.
        site.synchronised = False
        self.on_traced(site)
        if not training:
            site.unlike_replay = "it runs without a graph and is not Keras' own train_step"
        elif not regular:
            site.unlike_replay = "some of its exchanges are not those of a Keras optimizer"
        elif site.updates and not earlier:
            site.unlike_replay = foreign_change(site.updates, before)
        elif not site.updates:
            site.unlike_replay = "its optimizer has not updated anything so far"

    def _try_eagerly(self, given: Callable, fn: Callable[[], Any]) -> Any:
        probe = Site(is_probe=True)
        self._outside = False
        # If it is no run it may read what waits for the next one.
        self.controller.settle()
        copies = [c for v in self.registry.alive() for c in adapter.components(v)]
        before = [(c, c.read_value()) for c in copies]
        try:
            with self.at(probe):
                return fn()
        except _TrainingFound:
            pass
        except tf.errors.OpError:
            # The exchange is in a tf.function that was traced in another run.
            if not self._outside:
                raise
        # The function begins anew, as part of a run.
        for variable, value in before:
            variable.assign(value)
        return self.run_eagerly(given, fn, False, found=True)

    def _foreign(self) -> dict[int, tuple[tf.Variable, np.ndarray]]:
        return {id(v): (v, v.numpy()) for v in self.registry.alive() if not is_local(v)}

    # Hooks.

    def carried(self) -> Callable[[], contextlib.AbstractContextManager]:
        site = self.site
        return contextlib.nullcontext if site is None else functools.partial(self.at, site)

    def leaves_worker(self) -> bool:
        return self.controller is not None and self.site is not None and not self.stays_local()

    def all_reduce(self, reduce_op: tf.distribute.ReduceOp, values: list) -> list:
        return self._all_reduce(reduce_op, values, self._exchange)

    def _all_reduce(
        self, reduce_op: tf.distribute.ReduceOp, values: list, exchange: Callable
    ) -> list:
        site = self.site
        if site.is_probe:
            raise _TrainingFound
        wire = [self._as_sent(v) for v in values]
        if not all(v.shape.is_fully_defined() for v in wire):
            wire = [tf.convert_to_tensor(v) for v in wire]
        found = site.replayed_exchanges if site.replaying else site.exchanges
        number = len(found)
        found.append(traces.nesting(site.root))
        if site.replaying:
            tables = site.tables[number] if number < len(site.tables) else ()
            results = self._emit(site, self._stored_fn(site, wire, tables), [], wire)
        else:
            site.tables.append([isinstance(v, tf.IndexedSlices) for v in wire])
            if site.deferral is not None:
                held = site.deferral.hold(reduce_op, values, wire, bool(found[-1]))
                if held is not None:
                    return held
            results = exchange(site, wire)
        # Narrow values are widened before anything is computed with them.
        results = [
            tf.cast(r, traces.SUM_DTYPES[v.dtype]) for r, v in zip(results, values, strict=True)
        ]
        scale = self._replicas if reduce_op == tf.distribute.ReduceOp.MEAN else 1
        return [
            tf.cast(r if scale == 1 else r / tf.cast(scale, r.dtype), v.dtype)
            for r, v in zip(results, values, strict=True)
        ]

    def all_finite(self, optimizer: object, finite: tf.Tensor) -> tf.Tensor:
        if not self.leaves_worker():
            return finite
        not_finite = tf.cast([tf.logical_not(finite)], tf.int32)
        (total,) = self._all_reduce(
            tf.distribute.ReduceOp.SUM, [not_finite], self._exchange_of_flag
        )
        # A replay has to go through the outer optimizer.
        self.site.scalers[id(optimizer.inner_optimizer)] = optimizer
        return tf.equal(total[0], 0)

    def on_gradient_of_exchange(self) -> None:
        if not self._needs_all:
            raise ValueError(
                "Expected no exchange between workers inside of what is differentiated, because "
                "with backup workers, or another cutoff than FullSync(), a round goes on without "
                "some of the workers. Received: for "
                "instance BatchNormalization(synchronized=True). Leave `synchronized` out, or use "
                "backup_workers=0, and no `cutoff`."
            )

    def update(
        self,
        optimizer: object,
        variables: list,
        gradients: list,
        learning_rate: Any,
        apply: Callable[..., Any],
    ) -> Any:
        site = self.site
        if self.controller is None:
            self.count_alone()
        if site is None:
            return apply(gradients, learning_rate)
        if not site.replaying:
            site.updates.append((site.scalers.get(id(optimizer), optimizer), variables))
        if tf.executing_eagerly():
            return apply(gradients, learning_rate)
        rate = tf.convert_to_tensor(learning_rate)
        if site.deferral is not None and site.replaying:
            step = tf.convert_to_tensor(optimizer.iterations.value)
            return site.deferral.update_all(gradients, rate, step)
        if site.deferral is not None and site.deferral.takes(gradients):
            emit = functools.partial(self._emit_push, site)
            return site.deferral.push(emit, optimizer, variables, rate, apply)
        # A replay's nth update calls the function that was traced for the nth of the computed run.
        key = (site.num_updates, id(optimizer), *map(id, variables))
        site.num_updates += 1
        if key not in site.shared_updates:
            site.shared_updates[key] = tf.function(apply, autograph=False)
        return site.shared_updates[key](gradients, rate)

    def on_variable(self, variable: tf.Variable) -> None:
        if self.watches_variables:
            watched.watch(variable, self._on_use)
        self.registry.add(variable)

    def _on_use(self, variable: tf.Variable) -> None:
        if self.site is not None or self.controller is None:
            return
        if tf.executing_eagerly():
            if self.controller.is_pending(id(variable)):
                self.controller.settle()
        elif variable.trainable and not adapter.in_symbolic_scope() and not self.stays_local():
            # When such a function is called nobody is told. And what is made now is not to become
            # a part of it.
            with tf.init_scope():
                self.controller.update_at_once(
                    f"a tf.function uses the variable {variable.name.split(':')[0]!r} outside of "
                    "strategy.run"
                )

    def deferral(self) -> DeferredUpdate | None:
        """Returns what a training function's update may become, if updates are deferred at all."""
        if not self.watches_variables or self.stays_local():
            return None
        if len(self.strategy.extended.worker_devices) > 1:
            self.say_not_deferred("workers have several devices")
            return None
        if operation_threads() < 2:
            # Where an update is made between two runs, one of them is waiting for it.
            self.say_not_deferred(
                "TensorFlow has a single thread for operations; see "
                "tf.config.threading.set_inter_op_parallelism_threads"
            )
            return None
        return DeferredUpdate(self.strategy, self.controller)

    def say_not_deferred(self, why: str) -> None:
        """Tells the user, once, why an update does not wait for the next run."""
        self.controller.say_once(
            f"the update of a training function is made at its end, not in the next run: {why}"
        )

    # How.

    def _as_sent(self, value: tf.Tensor) -> tf.Tensor:
        if value.dtype not in traces.SUM_DTYPES:
            raise TypeError(
                f"Expected all_reduce of floats or integers. Received: a tensor of dtype "
                f"{value.dtype.name} ({value}). Cast it before the exchange."
            )
        if isinstance(value, tf.IndexedSlices):
            return tf.IndexedSlices(self._as_sent(value.values), value.indices, value.dense_shape)
        dtype = traces.SUM_DTYPES[value.dtype]
        return tf.cast(
            value, self._compression if dtype == tf.float32 and self._compression else dtype
        )

    def _exchange(self, site: Site, wire: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Emits an exchange; what backpropagation yields first is sent first."""
        give = self._in_run(self.controller.exchange)
        if tf.executing_eagerly() or not all(v.shape.is_fully_defined() for v in wire):
            return self._emit(site, give, wire, wire)
        way = self.controller.plan(
            [
                TensorSpec(v.dtype.name, tuple(v.shape), isinstance(v, tf.IndexedSlices))
                for v in wire
            ]
        )
        last = max(len(way.buckets) - 1, 0) if self.controller.offers_early else 0
        for number, bucket in enumerate(way.buckets[:last]):
            give = self._in_run(functools.partial(self.controller.offer, way, number))
            self._emit(site, give, parts(wire[t] for t in bucket.tensors), ())
        give = self._in_run(functools.partial(self.controller.exchange_last, way, last))
        inputs = parts(wire[t] for bucket in way.buckets[last:] for t in bucket.tensors)
        return self._emit(site, give, inputs, wire)

    def _emit_push(self, site: Site, fn: Callable, inputs: Sequence[tf.Tensor]) -> None:
        self._emit(site, self._in_run(lambda arrays: fn(*arrays)), inputs, ())

    def _exchange_of_flag(self, site: Site, wire: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return self._emit(site, self._exchange_of_flag_fn(), wire, wire)

    def _emit(
        self, site: Site, fn: Callable, inputs: Sequence[tf.Tensor], likes: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        if tf.executing_eagerly():
            return [tf.convert_to_tensor(r) for r in fn(*[i.numpy() for i in inputs])]
        # Exchanges of a run are numbered as they are executed, so workers must execute them alike.
        graph = tf.compat.v1.get_default_graph()
        before = site.last_exchange
        after = [before] if before is not None and before.graph is graph else []
        with tf.control_dependencies(after):
            results = tf.numpy_function(
                fn, inputs, [v.dtype for v in likes], name=traces.EXCHANGE_NAME
            )
        if not likes:
            site.last_exchange = results
            return []
        results = list(results) if isinstance(results, list | tuple) else [results]
        for result, like in zip(results, likes, strict=True):
            result.set_shape(like.shape)
        site.last_exchange = results[0].op
        return results

    def _in_run(self, give: Callable[[Sequence[np.ndarray]], Any]) -> Callable:
        def exchange(*arrays: Any) -> Any:
            if not self.controller.is_running:
                self._outside = True
                raise RuntimeError(
                    "Expected exchanges within `strategy.run` only. Received: an exchange outside "
                    "of it, in a tf.function that was traced within. Call that function in the "
                    "one that is given to strategy.run."
                )
            return give([np.asarray(a) for a in arrays])

        return exchange

    def _exchange_of_flag_fn(self) -> Callable:
        give = self._in_run(self.controller.exchange)

        def exchange(not_finite: np.ndarray) -> list[np.ndarray]:
            (total,) = give(not_finite)
            # The others go on with finite values; they do not know of these, which came too late.
            if np.any(not_finite) and not np.any(total):
                self.controller.withhold()
            return [total]

        return exchange

    def _stored_fn(
        self, site: Site, likes: Sequence[tf.Tensor], tables: Sequence[bool]
    ) -> Callable:
        if site.deferral is not None:
            return lambda: self.controller.stored(site.deferral.way)
        if len(tables) != len(likes):
            tables = [False] * len(likes)
        specs = [
            TensorSpec(v.dtype.name, tuple(v.shape.as_list()), by_rows)
            for v, by_rows in zip(likes, tables, strict=True)
        ]
        way = self.controller.plan(specs)
        return lambda: self.controller.stored(way)


class _TrainingFound(BaseException):
    """Unwinds an eager function when its first exchange shows that it is a training run."""
