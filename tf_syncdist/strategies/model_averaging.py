"""Synchronous model averaging, as a tf.distribute strategy."""

import numbers
import warnings
from typing import Any

import tensorflow as tf

from tf_syncdist.cutoff import FullSync, serialize
from tf_syncdist.mixing import averaging
from tf_syncdist.observability.mixing_reports import MixingReport, averaging_report
from tf_syncdist.propagation import FifoPropagation
from tf_syncdist.propagation import serialize as serialize_propagation
from tf_syncdist.propagation.policies import cutter
from tf_syncdist.strategies import adapter, keras_calls, options
from tf_syncdist.strategies.devices import local_devices
from tf_syncdist.strategies.learner_runs import Step
from tf_syncdist.strategies.learner_tuning import tune
from tf_syncdist.strategies.lifetime import say
from tf_syncdist.strategies.mixing_state import MadeVariables, MixingState
from tf_syncdist.strategies.mixing_strategy import MixingStrategy
from tf_syncdist.strategies.site import Site
from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.session import SessionConfig


class ModelAveragingStrategy(MixingStrategy):
    """Trains many learners with small batches, and averages their models.

    Every learner has a model, an optimizer's state and a batch of its own. After each step it is
    corrected towards the *central model*, by the share `correction` of its distance from it as it
    was before the step; the central model moves by the sum of all corrections, with momentum. So
    batches stay small where devices are many or large.

    The batch size given to `model.fit` is that of a learner. An epoch is still one pass over the
    data: with k learners in the job it has 1 / k as many runs as there are batches, rounded up.
    Learning rate and momentum may stay what they are for one learner; the central model moves like
    one that is trained with the k-fold batch. When the learning rate drops, by a quarter or more,
    all learners start again from the central model.

    evaluate, predict, save, get_weights and checkpoints see the central model, never a learner.
    Optimizers in them are the first learner's of this worker. The statistics of batch normalisation
    are each learner's own, and the central model's are their mean: over the learners of a worker
    after each run, over those of all workers after each epoch. With one learner in all this is
    plain training, bit for bit.

    Across workers the learners of a worker share its copy of the central model, and one sum per
    worker travels through the aggregation service while learners compute. Every run waits for every
    worker. A worker that joins late starts from the central model.

    Args:
        learners_per_device: How many learners each device of a worker has: 1 (the default), k, or
            "auto": `model.fit` first measures how many are worth while, by adding learners as long
            as each raises the throughput by more than a tenth, and prints what it has tried. Use
            more than one where a small batch does not fill a device, on CPUs best with the
            environment's TF_NUM_INTRAOP_THREADS=1. Each takes the memory of a model and an
            optimizer. Several workers measure at the same time and choose alike, by the slowest
            of them. "auto" stands for 1 in a custom loop, and in a `fit` after one.
        correction: alpha, which share of its distance from the central model a learner gives up.
            Default: `None`, for 1 / k with k learners in all. Lower it to let learners explore;
            from 2 / (k + 1) on, averaging overshoots.
        central_momentum: Momentum of the central model, 0.9 by default. With 0 its noise is the
            least; with 0.9 it gets to a given loss a little sooner.
        period: Learners are averaged in every period-th run. Default: 1. Raise it if the network
            sets the pace; learners then come apart further.
        cluster_resolver: See `SyncReplicasStrategy`, as for all arguments below.
        insecure: See `SyncReplicasStrategy`.
        tls_cert: See `SyncReplicasStrategy`.
        tls_key: See `SyncReplicasStrategy`.
        tls_ca: See `SyncReplicasStrategy`.
        token: See `SyncReplicasStrategy`.
        transport: See `SyncReplicasStrategy`.
        compression: See `SyncReplicasStrategy`; of the sums of corrections.
        deterministic: See `SyncReplicasStrategy`.
        min_workers: See `SyncReplicasStrategy`.
        detection_seconds: See `SyncReplicasStrategy`.
        limit_gbps: See `SyncReplicasStrategy`.
        connect_timeout_seconds: See `SyncReplicasStrategy`.
        timeout_seconds: See `SyncReplicasStrategy`.
        print_report: See `SyncReplicasStrategy`.

    Raises:
        ValueError: If an argument cannot be.
        CredentialsError: If a certificate, key or token cannot be used or would be exposed.
        AggregatorUnreachableError: If the service does not answer in time.

    Example:

    >>> import keras
    >>> strategy = ModelAveragingStrategy(learners_per_device=2)
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")

    References:
        Koliousis et al.: CROSSBOW: Scaling Deep Learning with Small Batch Sizes on Multi-GPU
        Servers, arXiv 1901.02244, algorithm 1.
    """

    def __init__(
        self,
        learners_per_device: int | str = 1,
        correction: float | None = None,
        central_momentum: float = 0.9,
        period: int = 1,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        *,
        insecure: bool = False,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        token: str | None = None,
        transport: str = "auto",
        compression: str | None = None,
        deterministic: bool = False,
        min_workers: int = 1,
        detection_seconds: float = 3.0,
        limit_gbps: float | None = None,
        connect_timeout_seconds: float = 30.0,
        timeout_seconds: float = 600.0,
        print_report: bool = True,
    ) -> None:
        _check(learners_per_device, correction, central_momentum, period)
        options.check(None, transport, compression, 0, 0)
        options.check_limit(limit_gbps)
        self._tunes = learners_per_device == "auto"
        self._learners_given = "auto" if self._tunes else int(learners_per_device)
        self._correction = correction
        self._momentum = central_momentum
        self._period = period
        self._options = {
            "transport": transport,
            "deterministic": deterministic,
            "min_workers": min_workers,
            "detection_seconds": detection_seconds,
            "limit_gbps": limit_gbps or 0.0,
            "connect_timeout_seconds": connect_timeout_seconds,
            "timeout_seconds": timeout_seconds,
        }
        self._moves = MadeVariables(self.scope, "tf_syncdist_move")
        self._highest_rates = MadeVariables(self.scope, "tf_syncdist_highest_rate")
        super().__init__(
            cluster_resolver,
            learners_per_device=1 if self._tunes else learners_per_device,
            insecure=insecure,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_ca=tls_ca,
            token=token,
            compression=compression,
            print_report=print_report,
        )
        with self.scope():
            self._run_number = tf.Variable(
                0, dtype=tf.int64, trainable=False, name="tf_syncdist_averaging_run"
            )
        self._warn_if_unstable()
        if self._member is not None:
            addresses = self._role.service_addresses
            cut = cutter(FifoPropagation(), None, len(addresses), self.num_workers)
            self._take_part(MixingState(self._registry, self._learners), cut)
            self._member.attach(self._controller, self.report)

    def _session_config(self, credentials: Credentials) -> SessionConfig:
        role = self._role
        options.check_faults(
            self._options["min_workers"], self._options["detection_seconds"], role.num_workers
        )
        return SessionConfig(
            addresses=role.service_addresses,
            worker=role.task_index,
            num_workers=role.num_workers,
            cutoff=serialize(FullSync()),
            address=role.address,
            credentials=credentials,
            propagation=serialize_propagation(FifoPropagation()),
            strategy=self._described(),
            **self._options,
        )

    def _described(self) -> str:
        """Returns the strategy with what all workers must give it alike."""
        correction = None if self._correction is None else float(self._correction)
        devices = len(local_devices())
        return (
            f"{type(self).__name__}(learners_per_device={self._learners_given!r}, "
            f"correction={correction}, central_momentum={float(self._momentum)}, "
            f"period={int(self._period)}) with {devices} device(s) in each worker"
        )

    @property
    def correction(self) -> float:
        """alpha, for as many learners as there are now."""
        if self._correction is not None:
            return self._correction
        return averaging.default_correction(self.num_learners)

    def _warn_if_unstable(self) -> None:
        largest = averaging.largest_stable_correction(self.num_learners)
        if self.num_learners > 1 and self.correction >= largest:
            warnings.warn(
                f"With {self.num_learners} learners, averaging is stable for a `correction` below "
                f"2 / (k + 1) = {largest:.3g}; above, learners and the central model overshoot one "
                f"another. Received: correction={self.correction:g}. Leave it out for 1 / k.",
                stacklevel=3,
            )

    # One run.

    def _mix(self, step: Step) -> Any:
        self._restart_if_rates_dropped(step)
        (number,) = adapter.components(self._run_number)
        if self._period == 1:
            found = self._averaged(step)
        else:
            due = tf.equal(number.read_value() % self._period, 0)
            found = tf.cond(due, lambda: self._averaged(step), step.compute)
        # A graph knows of what it reads; so whoever joins counts on from it.
        number.assign(number.read_value() + 1, read_value=False)
        return found

    def _averaged(self, step: Step) -> Any:
        """Emits what `averaging.averaged_in_groups` says, for this worker's learners."""
        central = step.central(step.trained)
        before = [v.read_value() for v in central]
        learners = [step.learner(n, step.trained) for n in range(step.num_learners)]
        # What the first learner gives up, and what each of the others takes on. Of additions
        # TensorFlow makes one operation, which adds in the order in which memory happens to be
        # free: sums would differ in their last bit from run to run. Differences it leaves alone.
        given, *taken = [
            [averaging.correction_of(z, w.read_value(), self.correction) if number
             else averaging.correction_of(w.read_value(), z, self.correction)
             for w, z in zip(learner, before, strict=True)]
            for number, learner in enumerate(learners)
        ]  # fmt: skip
        sums = given
        for others in taken:
            sums = [total - other for total, other in zip(sums, others, strict=True)]
        if self._member is not None and not self._runs.is_alone:
            # What has been summed over this worker's learners travels while they compute.
            sums = self._runs.all_reduce(tf.distribute.ReduceOp.SUM, sums)
        found = step.compute()
        for variable, part in zip(learners[0], given, strict=True):
            variable.assign_sub(part, read_value=False)
        for learner, own in zip(learners[1:], taken, strict=True):
            for variable, part in zip(learner, own, strict=True):
                variable.assign_add(part, read_value=False)
        for variable, container, model, total in zip(
            central, step.trained, before, sums, strict=True
        ):
            if not self._momentum:
                variable.assign(model + total, read_value=False)
                continue
            move = self._moves.of(container, container.shape, container.dtype)
            after = averaging.moved(
                averaging.Central(model, move.read_value()), total, self._momentum
            )
            variable.assign(after.model, read_value=False)
            move.assign(after.move, read_value=False)
        return found

    def _restart_if_rates_dropped(self, step: Step) -> None:
        optimizers = list({id(o): o for o, _ in step.updates}.values())
        drops = []
        for optimizer in optimizers:
            rate = tf.cast(optimizer.learning_rate, tf.float32)
            highest = self._highest_rates.of(optimizer)
            dropped = averaging.restarts(rate, highest.read_value())
            highest.assign(tf.where(dropped, rate, tf.maximum(rate, highest)), read_value=False)
            drops.append(dropped)

        def restart() -> tf.Tensor:
            for number in range(step.num_learners):
                for copy, model in zip(
                    step.learner(number, step.trained), step.central(step.trained), strict=True
                ):
                    copy.assign(model.read_value(), read_value=False)
            return tf.constant(True)

        tf.cond(tf.reduce_any(drops), restart, lambda: tf.constant(False))

    def _after_outside_write(self, variable: tf.Variable) -> None:
        super()._after_outside_write(variable)
        move = self._moves.known_of(variable)
        if move is not None:
            move.assign(tf.zeros_like(move), read_value=False)

    def _owned(self, site: Site) -> list[tf.Variable]:
        own = [self._run_number, *self._moves.all(), *self._highest_rates.all()]
        averages = {id(v.value) for o, _ in site.updates for v in adapter.averages_of(o)}
        return [v for v in super()._owned(site) if id(v) not in averages] + own

    # Reports.

    def report(self) -> MixingReport:
        """Returns how often learners were averaged, and how far they are from the central model.

        Printed, it is a few plain lines. No learner is stale: every run waits for all workers.

        Returns:
            A `tf_syncdist.observability.mixing_reports.MixingReport`.
        """
        rounds = super().report()
        done = int(adapter.components(self._run_number)[0].numpy())
        return averaging_report(
            self.worker_index,
            self.num_workers,
            rounds.rounds if self._is_alone else done,
            0 if self._is_alone else -(-done // self._period),
            self._learners.distance(),
            tuple(self.distances()),
            rounds,
        )

    # Keras.

    def _prepare_input(self, call: keras_calls.KerasCall, dataset: tf.data.Dataset) -> None:
        if not self._tunes:
            return
        session, run = None, self._runs.counted_alone()[0]
        if self._member is not None:
            session, run = self._member.session, self._controller.run
        if run:
            # Functions that are traced already have one learner for ever.
            if self.is_chief:
                say("learners_per_device='auto' is 1, since something was trained before this fit")
        else:
            try:
                tune(self._runs, self._learners, call.model, dataset, call.batch_size, session)
            finally:
                self._compiled.clear()
            self._warn_if_unstable()
        self._tunes = False


def _check(learners: Any, correction: Any, central_momentum: Any, period: Any) -> None:
    if learners != "auto" and not _is_count(learners):
        raise ValueError(
            '`learners_per_device` must be a number from 1, or "auto". '
            f"Received: learners_per_device={learners!r}."
        )
    if correction is not None and not (_is_real(correction) and 0 < correction < float("inf")):
        raise ValueError(
            "`correction` must be above 0, since learners that are not corrected have nothing to "
            f"do with one another. Received: correction={correction!r}. Leave it out for 1 / k."
        )
    if not (_is_real(central_momentum) and 0 <= central_momentum < 1):
        raise ValueError(
            "`central_momentum` must be from 0 to below 1, or the central model never comes to "
            f"rest. Received: central_momentum={central_momentum!r}. Leave it out for 0.9."
        )
    if not _is_count(period):
        raise ValueError(
            "`period` must be a number of runs from 1. "
            f"Received: period={period!r}. Use 1 to average after every run."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
