"""The base of the strategies that mix models: every learner takes its own optimizer's step."""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_syncdist.cluster import roles
from tf_syncdist.strategies import adapter, inputs, keras_calls, learner_inputs, options
from tf_syncdist.strategies.devices import local_devices
from tf_syncdist.strategies.graph_runs import run_in_graph
from tf_syncdist.strategies.job_side import JobSide
from tf_syncdist.strategies.joining import serve_or_join
from tf_syncdist.strategies.keras_side import KerasSide
from tf_syncdist.strategies.learner_runs import LearnerRuns, Step
from tf_syncdist.strategies.learners import Learners
from tf_syncdist.strategies.lifetime import Membership
from tf_syncdist.strategies.lifted import Lifted
from tf_syncdist.strategies.sources import Source
from tf_syncdist.strategies.variables import VariableRegistry
from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.session import SessionConfig


class MixingStrategy(KerasSide, JobSide, tf.distribute.Strategy):
    """Every learner trains a model of its own, and models are mixed.

    A worker has one learner or more. Each takes a batch as large as the user has made it, and its
    own optimizer's step; `num_replicas_in_sync` is 1, since no gradient is averaged. How models are
    mixed is what subclasses say in `_mix`. What the program has made is the *central model*: what
    evaluate, predict, save, get_weights and checkpoints see, never a learner. What is written from
    outside of training, as by `load_weights`, all learners take over.

    Args:
        cluster_resolver: See `SyncReplicasStrategy`.
        learners_per_device: How many learners each device of this worker has.
        insecure: See `SyncReplicasStrategy`, as for the other credentials.
        tls_cert: See `SyncReplicasStrategy`.
        tls_key: See `SyncReplicasStrategy`.
        tls_ca: See `SyncReplicasStrategy`.
        token: See `SyncReplicasStrategy`.
        compression: See `SyncReplicasStrategy`.
        print_report: Whether worker 0 prints the report when the program ends.
    """

    _collective_keys = itertools.count(20_000_000, 100_000)

    def __init__(
        self,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None,
        *,
        learners_per_device: int = 1,
        insecure: bool = False,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        token: str | None = None,
        compression: str | None = None,
        print_report: bool = True,
    ) -> None:
        role = self._role = roles.resolve(cluster_resolver)
        self._cluster_resolver_given = cluster_resolver
        self._member: Membership | None = None
        credentials = serve_or_join(
            role,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_ca=tls_ca,
            token=token,
            insecure=insecure,
        )
        if role.num_workers > 1:
            self._member = Membership(role, self._session_config(credentials), print_report)
        # Every contribution is needed, and none is scaled.
        self._aggregate = role.num_workers
        self._registry = VariableRegistry()
        devices = local_devices()
        self._learners = Learners(
            learners_per_device * len(devices),
            role.task_index,
            role.num_workers,
            devices,
        )
        self._runs = LearnerRuns(
            self,
            self._learners,
            self._mix,
            self._before_outside_use,
            self._after_outside_write,
            self._before_test,
            replicas=role.num_workers,
            worker=role.task_index,
            stays_local=self._is_local,
            registry=self._registry,
            on_traced=self._on_traced,
            compression=options.COMPRESSIONS[compression],
        )
        self._lifted = Lifted(self.run)
        self._compiled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._collective_key_base = next(self._collective_keys)
        # Learners are not replicas to TensorFlow: it sees one, on the first device.
        super().__init__(adapter.WorkerExtended(self, devices[:1], role.task_index, self._runs))
        adapter.count_batches_of_shares()
        keras_calls.install(self)

    # What subclasses say.

    def _session_config(self, credentials: Credentials) -> SessionConfig:
        """Returns what this worker tells the service."""
        raise NotImplementedError

    def _mix(self, step: Step) -> Any:
        """Emits one run of this worker's learners, and returns what `step.compute()` returns."""
        raise NotImplementedError

    def _in_job(self, emit: Callable[[], Any], given: Any) -> Any:
        """Emits a run that is part of a job of several workers; by default, a round of it.

        Args:
            emit: Emits what the run does.
            given: What it is given: it begins when that is there.
        """
        return run_in_graph(self._runs, emit, given)

    def _before_outside_use(self, variable: tf.Variable) -> None:
        """Is told of a variable before it is read or written outside of runs."""

    def _before_test(self) -> list[tf.Operation]:
        """Emits what is to happen before a function that trains nothing is executed."""
        return []

    def _after_outside_write(self, variable: tf.Variable) -> None:
        """Is told of a variable after it was written outside of runs: learners take it over."""
        self._learners.restart([variable])

    # Who is there.

    @property
    def num_replicas_in_sync(self) -> int:
        """1: each learner's loss is its own, and the batch size is that of a learner."""
        return 1

    @property
    def num_replicas_in_job(self) -> int:
        """How many learners the job has."""
        return self.num_workers * self._learners.count

    @property
    def num_learners(self) -> int:
        """How many learners the job has."""
        return self.num_workers * self._learners.count

    @property
    def learners_per_worker(self) -> int:
        """How many learners each worker has."""
        return self._learners.count

    @property
    def _is_alone(self) -> bool:
        return self._member is None and self._learners.count == 1

    def distances(self) -> list[float]:
        """Returns how far each learner of this worker is from the central model.

        Returns:
            For each learner the norm of the difference of what is trained, divided by the norm of
            the central model; zeros before the first run.
        """
        return self._learners.distances()

    # Runs.

    @adapter.own_code
    def run(
        self, fn: Callable, args: tuple = (), kwargs: dict | None = None, options: Any = None
    ) -> Any:
        """Invokes `fn` for each learner; if an optimizer updates variables in it, models are mixed.

        Args:
            fn: The function. With more than one learner in the job it is executed as a graph.
            args: Its positional arguments; of a PerReplica value each learner is given its part.
            kwargs: Its keyword arguments.
            options: Ignored, as by other strategies.

        Returns:
            What `fn` returns; with several learners on this worker, PerReplica values.
        """
        kwargs = kwargs or {}
        if self._is_alone or self._runs.site is not None or self._is_local():
            return super().run(fn, args, kwargs, options)
        if adapter.is_tf_function(fn):
            return self._lifted(fn)(*args, **kwargs)
        if tf.executing_eagerly():
            return self._as_graph(fn)(*args, **kwargs)
        converted = adapter.convert(fn)
        once = super().run
        args, kwargs = self._cut((args, kwargs))
        emit = functools.partial(
            self._runs.emit, fn, lambda a, k: once(converted, a, k, options), args, kwargs
        )
        alone = self._member is None or self._runs.is_alone
        return emit() if alone else self._in_job(emit, (args, kwargs))

    def _as_graph(self, fn: Callable) -> Callable:
        owner, function = getattr(fn, "__self__", fn), getattr(fn, "__func__", fn)
        compiled = self._compiled.setdefault(owner, weakref.WeakKeyDictionary())
        if function not in compiled:

            def run(*args: Any, **kwargs: Any) -> Any:
                return self.run(fn, args, kwargs)

            compiled[function] = tf.function(run, autograph=False, reduce_retracing=True)
        return compiled[function]

    # Keras.

    @contextlib.contextmanager
    def _keras_call(self, method: str, model: Any, arguments: dict[str, Any]) -> Iterator[None]:
        if self._member is not None:
            with super()._keras_call(method, model, arguments):
                yield
            return
        with keras_calls.calling(method, model, arguments, quiet=False):
            yield

    def _prepare_input(self, call: keras_calls.KerasCall, dataset: tf.data.Dataset) -> None:
        """Is called where a fit begins, before its input is divided."""

    def _check_batch_size(self, batch_size: int) -> None:
        """Any will do: it is that of a learner."""

    def _take_from_batch(self, arguments: dict[str, Any]) -> None:
        for name in ("x", "y", "sample_weight"):
            if arguments.get(name) is not None:
                arguments[name] = inputs.piece_of_arrays(
                    arguments[name], self.worker_index, self.num_workers
                )

    def _cut(self, values: Any) -> Any:
        """Cuts what `train_on_batch` was given into a piece for each learner of this worker."""
        call, count = keras_calls.current(), self._learners.count
        if count == 1 or call is None or call.method != "train_on_batch":
            return values
        return adapter.per_replica([inputs.piece(values, n, count) for n in range(count)])

    # Input.

    def experimental_distribute_dataset(
        self, dataset: tf.data.Dataset, options: tf.distribute.InputOptions | None = None
    ) -> Any:
        """Returns this worker's share of a dataset: each of its batches goes to one learner.

        With k learners in the job, an epoch of B batches has B / k runs, rounded up. Every worker
        must see the dataset in the same order. Within Keras' evaluate and predict the whole
        dataset is read. In a custom loop, do not distribute a dataset that is evaluated.

        Args:
            dataset: The dataset.
            options: See `tf.distribute.InputOptions`.
        """
        call = keras_calls.current()
        if call is not None and not call.takes_training_input():
            return super().experimental_distribute_dataset(dataset, options)
        if call is not None:
            self._prepare_input(call, dataset)
        if self._is_alone:
            return super().experimental_distribute_dataset(dataset, options)
        arrays = call is not None and call.batch_size is not None
        mine = learner_inputs.share(
            dataset,
            self._learners.count,
            self.worker_index,
            self.num_workers,
            batches=call.batches if arrays else None,
            batch_size=call.batch_size if arrays else None,
        )
        found, parts = mine.dataset, self._learners.count
        if mine.ends:
            found, parts = self._watch(found)
        if call is None:
            if mine.runs is not None:
                found = found.take(mine.runs * (parts if mine.size is None else 1))
            return inputs.WorkerDataset(
                found, None, False, self._begin_input, mine.runs, parts=parts, size=mine.size
            )
        builds = adapter.builds_from_input(call.model)
        return inputs.WorkerDataset(
            found,
            mine.runs,
            builds,
            self._begin_input,
            mine.runs,
            mine.spec,
            parts,
            mine.size,
            # Keras counts runs itself, but not within one execution.
            counts=call.model.steps_per_execution != 1,
            batches_per_run=mine.batches_per_run,
        )

    def _watch(self, dataset: tf.data.Dataset) -> tuple[tf.data.Dataset, int]:
        """Lets workers agree on where input of unknown length ends.

        Returns:
            A dataset, and how many elements of it a run takes.
        """
        if self._member is None:
            return dataset, self._learners.count
        # They agree on runs.
        dataset = inputs.group(dataset, self._learners.count)
        source = Source(self._member.session, self._controller, True, alike=False, skips=False)
        return source.watch(dataset), 1

    def distribute_datasets_from_function(
        self,
        dataset_fn: Callable[[tf.distribute.InputContext], tf.data.Dataset],
        options: tf.distribute.InputOptions | None = None,
    ) -> Any:
        """Returns the dataset that `dataset_fn` makes for this worker.

        Args:
            dataset_fn: Called with a `tf.distribute.InputContext` of as many pipelines as there are
                workers, in which one replica is in sync. Its dataset has batches of the size that
                a learner takes; a run takes one for each learner of this worker.
            options: See `tf.distribute.InputOptions`.
        """
        if self._is_alone:
            return super().distribute_datasets_from_function(dataset_fn, options)
        dataset = dataset_fn(tf.distribute.InputContext(self.num_workers, self.worker_index, 1))
        ends = int(dataset.cardinality()) != tf.data.INFINITE_CARDINALITY
        parts = self._learners.count
        if ends:
            dataset, parts = self._watch(dataset)
        return inputs.WorkerDataset(dataset, None, False, self._begin_input, parts=parts)

    def _begin_input(self) -> None:
        if self._member is not None:
            self._controller.input.begin_input(self._controller.run)

    # Values.

    @adapter.own_code
    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        """Combines a value over this worker's learners; nothing travels.

        Args:
            reduce_op: "SUM" or "MEAN".
            value: A value or a nest of values.
            axis: Axis to reduce along, or `None` to reduce over learners only.
        """
        if isinstance(value, dict | list | tuple):
            return tf.nest.map_structure(lambda v: self.reduce(reduce_op, v, axis), value)
        if self._member is not None and axis is None and adapter.is_sync_on_read(value):
            if tf.executing_eagerly():
                found = self._read_metric(value)
                if found is not None:
                    return found
        return super().reduce(reduce_op, value, axis)

    def _read_metric(self, variable: tf.Variable) -> tf.Tensor | None:
        """Returns a metric variable's value over all workers; `None` for this worker's own."""
        return self._epochs.read(variable, may_exchange=not self._is_local())

    def synchronize(self) -> None:
        """Combines over all workers, now, what Keras' `fit` combines after every epoch.

        Metrics are summed, so that their results are those of all workers until the next training
        run, and the statistics of batch normalisation are averaged. Every worker must call it at
        the same place. For custom loops.
        """
        if self._member is not None:
            self._epochs.synchronize()
