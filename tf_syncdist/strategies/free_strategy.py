"""The base of the strategies in which every worker trains by its own clock."""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_syncdist.cutoff import FullSync, serialize
from tf_syncdist.observability.mixing_reports import Exchanges, MixingReport
from tf_syncdist.propagation import FifoPropagation
from tf_syncdist.propagation import serialize as serialize_propagation
from tf_syncdist.strategies import adapter, keras_calls, options, traces
from tf_syncdist.strategies.controller import LocalReport
from tf_syncdist.strategies.exchangers import Exchanger
from tf_syncdist.strategies.free_runs import FreeRuns
from tf_syncdist.strategies.graph_runs import check_not_compiled
from tf_syncdist.strategies.learner_runs import Step
from tf_syncdist.strategies.lifetime import say
from tf_syncdist.strategies.mixed_variables import MixedVariables, wire_dtype
from tf_syncdist.strategies.mixing_strategy import MixingStrategy
from tf_syncdist.strategies.seeds import Seeds
from tf_syncdist.strategies.site import Site
from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.session import SessionConfig

# How long a worker that hosts the service waits for it to learn of a job in progress: longer than
# the service waits for workers that were there before.
_LEARN_SECONDS = 6.0
_LOOK_SECONDS = 0.02


class FreeStrategy(MixingStrategy):
    """Every worker takes its own steps by its own clock, and mixes its model with others'.

    A worker that hangs, fails or is slow holds nobody up. Evaluate and predict, and everything else
    outside of training, see what all workers have come to; each worker's own model is for its
    training only.

    Args:
        cluster_resolver: See `SyncReplicasStrategy`.
        period: Models are mixed in one of so many runs.
        session_options: What else the service is told; see `SessionConfig`.
        credentials: See `MixingStrategy`.
        print_report: See `MixingStrategy`.
    """

    def __init__(
        self,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None,
        period: int,
        session_options: dict[str, Any],
        credentials: dict[str, Any],
        print_report: bool,
    ) -> None:
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise ValueError(
                "`period` must be a number of runs from 1. "
                f"Received: period={period!r}. Use 1 to mix models in every run."
            )
        options.check(None, session_options["transport"], None, 0, 0)
        options.check_limit(session_options["limit_gbps"])
        self._period = period
        self._session_options = session_options
        self._given: list[tf.Tensor] = []
        super().__init__(cluster_resolver, print_report=print_report, **credentials)
        if self._learners.count > 1:
            if self._member is not None:
                self._member.close()
            raise ValueError(
                "Expected workers with one device each, since every worker trains one model. "
                f"Received: {self._learners.count} devices. Start one worker per device (with "
                "CUDA_VISIBLE_DEVICES, for instance), or use ModelAveragingStrategy."
            )
        if self._member is not None:
            self._begin()

    def _begin(self) -> None:
        session = self._member.session
        self._exchanger = self._make_exchanger()
        self._stopping = OwnStopping()
        self._free = FreeRuns(
            session, self._exchanger, self._period, lambda: self._stopping.fit, say
        )
        self._controller = self._free
        self._epochs = NoEpochs()
        self._seeds = Seeds(self._registry, self.worker_index)
        exchanger = self._exchanger
        self._member.attach(
            self._free, self._free.mixing_report, exchanger.close, exchanger.interrupt
        )
        self._has_common_seed = not adapter.global_seed_is_set()
        self._set_common_seed()
        # Where the job is, if this process takes the place of another one of its worker.
        self._in_progress = self._member.session.came_again
        self._has_caught_up = False
        # A service that has come with this worker learns of the job from others, if there is one.
        self._may_learn = not self._role.aggregators and self.is_chief

    # What subclasses say.

    def _centre(self) -> str:
        """Returns how the service mixes models, serialized; empty if it does not."""
        return ""

    def _serves(self, credentials: Credentials) -> str:
        """Returns the address at which this worker serves its model; empty if it does not."""
        del credentials
        return ""

    def _described(self) -> str:
        """Returns the strategy with what all workers must give it alike."""
        return f"{type(self).__name__}(period={self._period})"

    def _make_exchanger(self) -> Exchanger:
        """Returns what mixes models."""
        raise NotImplementedError

    def _mixed(self, step: Step, model: MixedVariables) -> Any:
        """Emits a run in which models are mixed; returns what `step.compute()` returns."""
        raise NotImplementedError

    # One run.

    def _session_config(self, credentials: Credentials) -> SessionConfig:
        role, given = self._role, self._session_options
        options.check_faults(1, given["detection_seconds"], role.num_workers)
        return SessionConfig(
            addresses=role.service_addresses,
            worker=role.task_index,
            num_workers=role.num_workers,
            cutoff=serialize(FullSync()),
            address=role.address,
            credentials=credentials,
            propagation=serialize_propagation(FifoPropagation()),
            centre=self._centre(),
            serves=self._serves(credentials),
            strategy=self._described(),
            **{**given, "limit_gbps": given["limit_gbps"] or 0.0},
        )

    def _in_job(self, emit: Callable[[], Any], given: Any) -> Any:
        # A run begins when its input is there: an iterator at its end must not begin one.
        flat = tf.nest.flatten(given, expand_composites=True)
        self._given = [t for t in flat if tf.is_symbolic_tensor(t)]
        try:
            return emit()
        finally:
            self._given = []

    def _mix(self, step: Step) -> Any:
        check_not_compiled()
        for optimizer, _ in step.updates:
            for variable in optimizer.variables:
                self._registry.check(variable.value, variable.path)
        self._seeds.fold(step.used)
        model = MixedVariables(step)
        with tf.control_dependencies([self._runs.token.read_value(), *self._given]):
            due = tf.numpy_function(lambda: self._free.begin(model), [], tf.bool, name="begin_run")
        due.set_shape(())

        def finish(found: Any) -> Any:
            after = traces.last_call()
            with tf.control_dependencies([after] if after is not None else []):
                done = tf.numpy_function(self._free.finish, [], [])
            with tf.control_dependencies([done]):
                return tf.nest.map_structure(_identity, found, expand_composites=True)

        return tf.cond(
            due,
            lambda: finish(self._mixed(step, model)),
            lambda: finish(step.compute()),
        )

    def _exchange(self, values: Sequence[tf.Tensor], model: MixedVariables) -> list[tf.Tensor]:
        """Emits an exchange of values, and returns what others say to them."""
        sent = [tf.cast(v, wire_dtype(own)) for v, own in zip(values, model.own, strict=True)]
        found = tf.numpy_function(
            lambda *arrays: self._free.exchange(arrays),
            sent,
            [s.dtype for s in sent],
            name="tf_syncdist_mix",
        )
        found = list(found) if isinstance(found, list | tuple) else [found]
        received = []
        for tensor, value in zip(found, values, strict=True):
            tensor.set_shape(value.shape)
            received.append(tf.cast(tensor, value.dtype))
        return received

    def _on_traced(self, site: Site) -> None:
        """Is not called: runs are no rounds."""

    # What is seen outside of training.

    def _before_outside_use(self, variable: tf.Variable) -> None:
        if self._member is not None and tf.executing_eagerly() and self._free.trains(variable):
            self._free.settle()

    def _before_test(self) -> list[tf.Operation]:
        if self._member is None or adapter.is_compiled():
            return []
        # The variables that the function reads are those that everybody sees.
        return [tf.numpy_function(self._free.settle, [], [])]

    def _before_look(self) -> None:
        # As before evaluate: others may have trained since this worker's last run.
        if self._member is not None and tf.executing_eagerly():
            self._free.refresh()

    def _after_outside_write(self, variable: tf.Variable) -> None:
        super()._after_outside_write(variable)
        if self._member is None or not self._is_mixed(variable):
            return
        # A model that was trained earlier, as a teacher or a target network, is not being mixed.
        ref = weakref.ref(variable)

        def written() -> None:
            if self._free.trains(ref()):
                self._free.written()

        if tf.executing_eagerly():
            written()
        else:
            tf.numpy_function(written, [], [])

    def _is_mixed(self, variable: tf.Variable) -> bool:
        """Returns whether this worker trains, or has trained, with another copy of a variable."""
        copies = self._learners.copies(variable)
        return bool(copies) and copies[0] is not adapter.components(variable)[0]

    # Keras.

    @contextlib.contextmanager
    def _keras_call(self, method: str, model: Any, arguments: dict[str, Any]) -> Iterator[None]:
        if self._member is not None and method not in keras_calls.TRAINING:
            # Others may have trained since, so what was seen before will not do.
            self._free.refresh()
        with super()._keras_call(method, model, arguments):
            yield

    def _prepare_training(
        self, call: keras_calls.KerasCall, arguments: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        if self._may_learn:
            # Before the input is made, which is shuffled by the job's seed.
            self._may_learn = False
            self._learn_of_job()
        super()._prepare_training(call, arguments, stack)

    def _learn_of_job(self) -> None:
        session = self._member.session
        deadline = time.monotonic() + _LEARN_SECONDS
        while not session.has_started():
            if time.monotonic() > deadline:
                return
            time.sleep(_LOOK_SECONDS)
        if session.job_seed != self._common_seed:
            self._set_common_seed()
        # In a new job the others are where this one begins, since they wait for its model.
        epoch = session.wait_started().epoch
        self._in_progress = epoch if epoch.fit else None

    def _begin_fit(self) -> int | None:
        """Returns where a process begins that takes the place of another one of its worker."""
        again = self._in_progress
        if again is None or self._has_caught_up:
            return None
        if self._stopping.fit < again.fit:
            # The program is to see, and may save, what the others have come to, not what it has
            # made itself; a run joins what they train now.
            return keras_calls.ONLY_LOOK
        self._has_caught_up = True
        return again.epoch if self._stopping.fit == again.fit else None

    def _epoch_of_chief(self, epoch: int | None) -> int | None:
        return epoch

    def _watch(self, dataset: tf.data.Dataset) -> tuple[tf.data.Dataset, int]:
        # Each worker's input ends where it ends.
        return dataset, self._learners.count

    def _begin_input(self) -> None:
        pass

    def _read_metric(self, variable: tf.Variable) -> tf.Tensor | None:
        return None

    def synchronize(self) -> None:
        """Lets everything outside of training see what all workers have come to now.

        fit, evaluate, predict, save and get_weights of a model do it by themselves. Variables that
        are read otherwise, as by `tf.train.Checkpoint`, are fetched if this worker has trained
        since it saw them last; call this first if others may have, too, or if they are read in a
        tf.function. Nobody waits for anybody.
        """
        if self._member is not None:
            self._free.refresh()

    def distances(self) -> list[float]:
        """Returns how far this worker's model is from what all workers have come to now.

        Returns:
            The norm of the difference of what is trained, divided by the norm of the common model;
            zero before the first run.
        """
        self.synchronize()
        return super().distances()

    # Reports.

    @property
    def resume_run(self) -> int:
        """0: a worker begins with the centre or a partner's model, and counts its own runs."""
        return 0

    def report(self) -> MixingReport:
        """Returns exchanges, staleness, and the distance between models; printed, a few lines.

        Returns:
            A `tf_syncdist.observability.mixing_reports.MixingReport`.
        """
        if self._member is None:
            return MixingReport(0, 1, self._runs.counted_alone()[0], Exchanges())
        return self._free.mixing_report()

    def local_report(self) -> LocalReport:
        """Returns this worker's own counts, without asking anybody."""
        if self._member is None:
            runs, seconds = self._runs.counted_alone()
            return LocalReport(0, 1, runs, runs, 0, 0, 0, seconds)
        return self._free.report()


class NoEpochs:
    """Stands for exchanges after epochs, where there are none."""

    def forget_sums(self) -> None:
        """Metrics are this worker's own."""

    def synchronize(self) -> None:
        """Asks nobody."""


class OwnStopping:
    """When a fit stops: where this worker wishes; the others go on."""

    def __init__(self) -> None:
        self._fit = 0
        self._wished = False

    @property
    def fit(self) -> int:
        """How many fits have begun; every worker counts alike."""
        return self._fit

    @property
    def stopped(self) -> bool:
        """Whether the fit in progress is to stop now."""
        return self._wished

    def begin_fit(self) -> None:
        """Takes note that a fit begins."""
        self._fit += 1
        self._wished = False

    def wish(self, stops: bool) -> None:
        """Takes note of what this worker's callbacks want."""
        self._wished = bool(stops)

    def after_epoch(self) -> None:
        """Asks nobody."""


def _identity(value: Any) -> Any:
    return tf.identity(value) if tf.is_tensor(value) else value
