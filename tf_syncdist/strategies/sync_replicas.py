"""Synchronous SGD with backup workers, as a tf.distribute strategy."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_syncdist.cluster import roles
from tf_syncdist.cutoff import CutoffPolicy, serialize, waits_for_all
from tf_syncdist.propagation import AutoPropagation, PriorityPropagation, Propagation
from tf_syncdist.propagation import serialize as serialize_propagation
from tf_syncdist.propagation.policies import cutter
from tf_syncdist.strategies import adapter, inputs, keras_calls, options
from tf_syncdist.strategies.devices import local_devices
from tf_syncdist.strategies.graph_runs import run_in_graph
from tf_syncdist.strategies.job_side import JobSide
from tf_syncdist.strategies.joining import serve_or_join
from tf_syncdist.strategies.keras_side import KerasSide
from tf_syncdist.strategies.lifetime import Membership
from tf_syncdist.strategies.lifted import Lifted
from tf_syncdist.strategies.runs import Runs
from tf_syncdist.strategies.sources import Source
from tf_syncdist.strategies.state import CommonState
from tf_syncdist.strategies.variables import VariableRegistry
from tf_syncdist.transport.session import SessionConfig


class SyncReplicasStrategy(KerasSide, JobSide, tf.distribute.Strategy):
    """Trains on several workers and does not wait for the slowest ones.

    N + b workers compute gradients for the same variables; the first N contributions of a round
    make the update, which is their mean; late ones are counted and dropped. A worker that finds
    its round over applies the stored result instead of computing. All workers hold identical
    variables after every round they have done.

    The batch size given to `model.fit` is the batch size of an update: each contribution is
    computed from 1 / N of a batch. `evaluate`, `predict`, `save` and everything else outside of
    training runs is local to a worker; any one of them may do it alone.

    Args:
        backup_workers: b, the number of contributions that a round does without, 0 (the default)
            to workers - 1. Raise it if the report shows that workers are late in turn; with 0,
            every round waits for every worker.
        cluster_resolver: A `tf.distribute.cluster_resolver.ClusterResolver`. By default roles and
            addresses come from TF_CONFIG; without it there is one worker and no service. A `ps`
            task serves until the job ends: this call does not return there.
        cutoff: A policy of `tf_syncdist.cutoff`, in place of `backup_workers`: `Deadline` closes
            rounds by time; `OrderStatistics`, `Elfving` and `LearnedCutoff` choose anew for each
            round how many contributions it waits for, from how long workers took before. With
            these N is the number of all workers. Give one if which workers are slow, or how many,
            changes while the job runs.
        insecure: Whether the service may listen beyond loopback without TLS, and the token travel
            there in plain text, on a network that you trust. Default: `False`.
        tls_cert: Path of this task's certificate as PEM. With `tls_key` and `tls_ca` everything
            between tasks is encrypted, and every task has to show a certificate that the CA has
            signed; see docs/security.md. Default: the environment variable TF_SYNCDIST_TLS_CERT;
            an empty string stands for none.
        tls_key: Path of its private key as PEM, without a password. Default:
            TF_SYNCDIST_TLS_KEY.
        tls_ca: Path of the CA's certificate as PEM. The service's certificate must be for the
            host name by which the cluster names it. Default: TF_SYNCDIST_TLS_CA.
        token: A secret that is the same on all tasks of a job; the service refuses every call
            without it. Default: TF_SYNCDIST_TOKEN, otherwise none.
        bucket_bytes: Small tensors share a message until it has this many bytes, larger ones are
            cut; a bucket leaves as soon as backpropagation has yielded it. By default a twelfth
            of all gradients, 4 to 16 MiB, less with more workers. A smaller one lets more of the
            exchange happen during backpropagation, at some CPU time per bucket.
        propagation: In which order gradients travel, and when they are waited for: a
            `tf_syncdist.propagation.FifoPropagation` (the default) or `PriorityPropagation`, which
            sends what the next forward pass needs first and does not wait for the rest. Use that
            where the network sets the pace, or "auto", which measures whether it does.
        transport: How gradients reach the service. "auto" (the default): through shared memory
            where the service runs on the same machine and memory can be shared with it, else
            over gRPC. "grpc" and "shared_memory" allow one of them only.
        compression: "float16" or "bfloat16" halves the bytes of float32 gradients on the wire;
            `None` (the default) sends them as they are. Sums are made in float32. Each
            contribution and the sum are rounded once, to 11 significant bits (float16) or 8
            (bfloat16); float16 is infinite beyond 65504 and loses values below 6e-8. Rounding
            costs the CPU more than shared memory or a fast network can win back: use it where
            the network is thin.
        deterministic: Whether sums are made in the order of the workers, so that two runs of a
            job end with the same bits. Needs all workers (no backup workers). Default: `False`,
            in the order of arrival. Over gRPC the service reads a worker's values only when it
            is their turn.
        nonfinite: What a worker does with gradients of its own that hold NaN or Inf. "pass" (the
            default) sends them unseen. "drop" keeps everything of the worker out of that round,
            and the others go on without it; the report counts such rounds. "error" ends this
            worker's program with a `NonFiniteGradientError`, and the others go on without it.
            Both look at every value before any is sent, which costs a pass over memory and the
            overlap of sending with backpropagation. Gradients are looked at as they are sent,
            after `compression`, and, under a `LossScaleOptimizer`, only where it applies them.
        history_rounds: Results are kept for at least this many rounds for workers that are
            behind. Default: 4.
        history_bytes: And for more rounds, while they need at most this many bytes. Default:
            512 MiB. Raise it if the report shows missed rounds.
        min_workers: No round is closed with fewer workers than this; below it, all wait until one
            comes back. Default: 1. Raise it if an update from few workers is worse than none.
        detection_seconds: A worker of which nothing is heard for so long is not waited for until
            it is heard of again; less where rounds are fast (300 of them, but at least 1 s). One
            whose process ends is noticed at once. Default: 3. Raise it if machines stall.
        limit_gbps: Lets so many gigabits per second pass between this worker and the service, in
            each direction, to try on one machine what a thin network does; use transport="grpc"
            with it, since memory has no limit. Default: `None`, no limit.
        timeline: File in which each worker records when it computed, and when each slice was sent,
            summed, received and applied, for Perfetto or chrome://tracing; "trace.json" becomes
            "trace.worker-1.json" on worker 1. Default: `None`, nothing is recorded.
        record_trace: File in which the service, its first process, records how long each worker
            takes for each round, to simulate cutoffs with and to train a model of the cluster. With
            `python -m tf_syncdist.aggregator` as `ps` task give that its flag of the same name.
            Default: `None`, nothing is recorded.
        connect_timeout_seconds: How long to wait for the service to answer, at the start and when
            it went away. Default: 30.
        timeout_seconds: How long to wait for other workers, at the start and in each round.
            Default: 600. Raise it if one step can take longer.
        print_report: Whether worker 0 prints the report when the program ends. Default: `True`.

    Raises:
        ValueError: If the arguments contradict each other or the cluster.
        CredentialsError: If a certificate, key or token cannot be used or would be exposed.
        AggregatorUnreachableError: If the service does not answer in time.

    Example:

    >>> import keras
    >>> strategy = SyncReplicasStrategy(backup_workers=0)
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")

    References:
        Chen, Pan, Monga, Bengio, Jozefowicz: Revisiting Distributed Synchronous SGD,
        arXiv 1604.00981, section on Sync-Opt with backup workers.
    """

    _collective_keys = itertools.count(10_000_000, 100_000)

    def __init__(
        self,
        backup_workers: int | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        *,
        cutoff: CutoffPolicy | None = None,
        insecure: bool = False,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        token: str | None = None,
        bucket_bytes: int | None = None,
        propagation: Propagation | str | None = None,
        transport: str = "auto",
        compression: str | None = None,
        deterministic: bool = False,
        nonfinite: str = "pass",
        history_rounds: int = 4,
        history_bytes: int = 512 * 2**20,
        min_workers: int = 1,
        detection_seconds: float = 3.0,
        limit_gbps: float | None = None,
        timeline: str | None = None,
        record_trace: str | None = None,
        connect_timeout_seconds: float = 30.0,
        timeout_seconds: float = 600.0,
        print_report: bool = True,
    ) -> None:
        policy = options.policy(backup_workers, cutoff)
        options.check(bucket_bytes, transport, compression, history_rounds, history_bytes)
        options.check_nonfinite(nonfinite)
        options.check_limit(limit_gbps)
        propagation = options.propagation(propagation)
        role = roles.resolve(cluster_resolver)
        self._aggregate = policy.replicas_to_aggregate(role.num_workers)
        options.check_faults(min_workers, detection_seconds, role.num_workers)
        options.check_order(deterministic, policy)
        options.check_planner(policy, role)
        trace = options.record_trace(record_trace, role)
        self._role = role
        self._waits_for_all = waits_for_all(policy)
        self._cluster_resolver_given = cluster_resolver
        self._member: Membership | None = None
        credentials = serve_or_join(
            role,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_ca=tls_ca,
            token=token,
            insecure=insecure,
            record_trace=trace,
        )
        devices = local_devices()
        if role.num_workers > 1:
            config = SessionConfig(
                addresses=role.service_addresses,
                worker=role.task_index,
                num_workers=role.num_workers,
                cutoff=serialize(policy),
                history_rounds=history_rounds,
                history_bytes=history_bytes,
                connect_timeout_seconds=connect_timeout_seconds,
                timeout_seconds=timeout_seconds,
                transport=transport,
                deterministic=deterministic,
                address=role.address,
                min_workers=min_workers,
                detection_seconds=detection_seconds,
                credentials=credentials,
                propagation=serialize_propagation(propagation),
                credit_bytes=getattr(propagation, "credit_bytes", 0),
                runs_ahead=int(isinstance(propagation, PriorityPropagation)),
                limit_gbps=limit_gbps or 0.0,
                timeline=options.timeline(timeline, role),
                strategy=type(self).__name__,
            )
            self._member = Membership(role, config, print_report, trace)
        self._registry = VariableRegistry()
        self._runs = Runs(
            self,
            self._aggregate * len(devices),
            role.task_index,
            waits_for_all(policy),
            self._is_local,
            self._registry,
            self._on_traced,
            options.COMPRESSIONS[compression],
            isinstance(propagation, PriorityPropagation) and self._member is not None,
        )
        self._lifted = Lifted(self.run)
        first_replica = role.task_index * len(devices)
        # MirroredExtended reads it from its strategy; two of them must not share their keys.
        self._collective_key_base = next(self._collective_keys)
        super().__init__(adapter.WorkerExtended(self, devices, first_replica, self._runs))
        if self._member is not None:
            cut = cutter(propagation, bucket_bytes, len(role.service_addresses), role.num_workers)
            self._take_part(
                CommonState(self._registry),
                cut,
                nonfinite=nonfinite,
                overlaps=getattr(propagation, "overlap", True),
                chooses=isinstance(propagation, AutoPropagation),
            )
        keras_calls.install(self)

    # Runs.

    @adapter.own_code
    def run(
        self, fn: Callable, args: tuple = (), kwargs: dict | None = None, options: Any = None
    ) -> Any:
        """Invokes `fn` on each replica; if it exchanges gradients, it is a training run.

        Args:
            fn: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            options: Ignored, as by other strategies.

        Returns:
            What `fn` returns; on a worker that skips the round, what it returned last.
        """
        kwargs = kwargs or {}
        if self._member is None or self._runs.site is not None or self._is_local():
            return super().run(fn, args, kwargs, options)
        if adapter.is_tf_function(fn):
            return self._lifted(fn)(*args, **kwargs)
        converted = adapter.convert(fn)
        once = functools.partial(super().run, converted, args, kwargs, options)
        if not tf.executing_eagerly():
            return run_in_graph(self._runs, once, (args, kwargs))
        call = keras_calls.current()
        return self._runs.run_eagerly(fn, once, call is not None and call.is_standard)

    # Input.

    def experimental_distribute_dataset(
        self, dataset: tf.data.Dataset, options: tf.distribute.InputOptions | None = None
    ) -> Any:
        """Returns this worker's share of a dataset whose batches are those of an update.

        Every worker must see the dataset in the same order: give `shuffle` a seed, or leave
        TensorFlow's global seed alone. Within Keras' evaluate and predict the whole dataset is
        read. In a custom loop, do not distribute a dataset that is evaluated by one worker.

        Args:
            dataset: The dataset.
            options: See `tf.distribute.InputOptions`.

        Raises:
            ValueError: If the batch size is not divisible by N.
        """
        call = keras_calls.current()
        if self._member is None or (call is not None and not call.takes_training_input()):
            return super().experimental_distribute_dataset(dataset, options)
        share = (self._aggregate, self.worker_index, self.num_workers)
        continued = call is not None and call.batch_size is not None
        if continued:
            dataset = inputs.divide_arrays(dataset, *share)
            own, ends, batches = False, False, call.batches
        else:
            batches = int(dataset.cardinality())
            own = inputs.is_sharded_by_user(dataset)
            dataset = inputs.divide(dataset, *share)
            ends = batches == tf.data.UNKNOWN_CARDINALITY
            if own and batches >= 0:
                # Shares may differ in length, but an epoch has the announced number of batches.
                dataset = dataset.repeat()
                continued = call is not None
        dataset = self._watch(dataset, ends, not own, call is not None)
        if batches >= 0 and not continued:
            # A worker that was behind has not read all, but a replayed run counts as a batch.
            dataset = dataset.take(batches)
        dataset = inputs.split(dataset, len(self.extended.worker_devices))
        builds = call is not None and adapter.builds_from_input(call.model)
        each = batches if continued else None
        counts = call is None or call.model.steps_per_execution != 1
        return inputs.WorkerDataset(dataset, each, builds, self._begin_input, counts=counts)

    def _watch(
        self, dataset: tf.data.Dataset, ends: bool, alike: bool, fits: bool
    ) -> tf.data.Dataset:
        skips = fits and not self._waits_for_all
        if not (ends or skips):
            return dataset
        source = Source(self._member.session, self._controller, ends, alike, skips)
        return source.watch(dataset)

    def distribute_datasets_from_function(
        self,
        dataset_fn: Callable[[tf.distribute.InputContext], tf.data.Dataset],
        options: tf.distribute.InputOptions | None = None,
    ) -> Any:
        """Returns the dataset that `dataset_fn` makes for this worker.

        Args:
            dataset_fn: Called with a `tf.distribute.InputContext` that tells the truth: the
                number of input pipelines is that of all workers, backup workers included, and
                `get_per_replica_batch_size` divides by N x devices. Its dataset has batches of
                that size. The shares of workers may differ in length: who has come to the end of
                its own takes part no more, and the input ends for all workers as soon as fewer
                than N have some left.
            options: See `tf.distribute.InputOptions`.
        """
        if self._member is None:
            return super().distribute_datasets_from_function(dataset_fn, options)
        dataset = dataset_fn(
            tf.distribute.InputContext(
                self.num_workers, self.worker_index, self.num_replicas_in_sync
            )
        )
        # The shares of workers may differ in length.
        ends = int(dataset.cardinality()) != tf.data.INFINITE_CARDINALITY
        dataset = inputs.group(dataset, len(self.extended.worker_devices))
        dataset = self._watch(dataset, ends, alike=False, fits=False)
        return inputs.WorkerDataset(dataset, None, False, self._begin_input)

    def _begin_input(self) -> None:
        self._controller.input.begin_input(self._controller.run)

    # Values.

    @adapter.own_code
    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        """Combines a value over this worker's replicas; nothing travels.

        A metric variable is combined over all workers, once per epoch (see docs/semantics.md).

        Args:
            reduce_op: "SUM" or "MEAN".
            value: A value or a nest of values.
            axis: Axis to reduce along, or `None` to reduce over replicas only.
        """
        if isinstance(value, dict | list | tuple):
            return tf.nest.map_structure(lambda v: self.reduce(reduce_op, v, axis), value)
        if self._member is not None and axis is None and adapter.is_sync_on_read(value):
            if tf.executing_eagerly():
                found = self._epochs.read(value, may_exchange=not self._is_local())
                if found is not None:
                    return found
        return super().reduce(reduce_op, value, axis)

    def synchronize(self) -> None:
        """Combines over all workers, now, what Keras' `fit` combines after every epoch.

        Metrics are summed, so that their results are those of all workers until the next training
        run, the statistics of batch normalisation are averaged, and a worker whose variables have
        come to differ is mended. Every worker must call it at the same place. For custom loops.
        """
        if self._member is not None:
            self._epochs.synchronize()
