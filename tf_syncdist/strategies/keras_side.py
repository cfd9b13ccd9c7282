"""What a strategy does when Keras calls it: where a fit begins, and what its end says."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tf_syncdist.cluster.interrupts import exit_status
from tf_syncdist.errors import SyncDistError
from tf_syncdist.strategies import adapter, inputs, keras_calls
from tf_syncdist.strategies.controller import RunController
from tf_syncdist.strategies.epochs import EpochExchange
from tf_syncdist.strategies.lifetime import Membership
from tf_syncdist.strategies.seeds import Seeds
from tf_syncdist.strategies.stopping import Stopping
from tf_syncdist.strategies.variables import VariableRegistry


class KerasSide:
    """The part of a strategy that wraps Keras' methods; see `keras_calls`."""

    is_chief: bool
    worker_index: int
    _aggregate: int
    _common_seed: int
    _controller: RunController
    _epochs: EpochExchange
    _member: Membership | None
    _registry: VariableRegistry
    _seeds: Seeds
    _set_common_seed: Callable[[], None]
    _stopping: Stopping

    def _epoch_of_chief(self, epoch: int | None) -> int | None:
        if self._member is None:
            return epoch
        return self._epochs.epoch_of_chief(self._stopping.fit, epoch)

    def _is_local(self) -> bool:
        call = keras_calls.current()
        return call is not None and not call.trains

    @contextlib.contextmanager
    def _keras_call(self, method: str, model: Any, arguments: dict[str, Any]) -> Iterator[None]:
        quiet = self._member is not None and not self.is_chief
        before = self._member is not None and self._member.interrupted
        with contextlib.ExitStack() as stack:
            call = stack.enter_context(keras_calls.calling(method, model, arguments, quiet))
            if self._member is None:
                yield
                return
            if call.trains:
                self._prepare_training(call, arguments, stack)
            else:
                self._controller.settle()
                if adapter.is_validation(arguments):
                    # All workers come to it. Most training functions have metrics, and reading
                    # these has exchanged all that there is already.
                    self._epochs.synchronize()
                self._epochs.forget_sums()
            try:
                yield
                self._controller.settle()
            except BaseException as e:
                self._member.failed = call.trains
                interrupted = None if before else self._member.interrupted
                if interrupted is not None and isinstance(e, Exception):
                    # An error for the step that was cut short hides the interrupt.
                    if interrupted is signal.SIGINT:
                        raise KeyboardInterrupt from None
                    raise SystemExit(exit_status(interrupted)) from None
                cause = self._controller.error
                if cause is not None and isinstance(e, tf.errors.OpError):
                    raise cause from None
                raise
            self._member.failed = False

    def _prepare_training(
        self, call: keras_calls.KerasCall, arguments: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        _check_model(call.model)
        if self._member.interrupted is not None:
            raise SyncDistError(
                "Expected a worker that takes part in the job. Received: one that was interrupted "
                f"by {self._member.interrupted.name}, so it takes part no more. Start the program "
                "again to train on; evaluate, predict and save still work."
            )
        # TensorFlow's own errors for a mixture say nothing of the scope.
        for variable in (
            *getattr(call.model.optimizer, "variables", ()),
            *call.model.trainable_variables,
        ):
            self._registry.check(variable.value, variable.path)
        if call.batch_size is not None:
            self._check_batch_size(call.batch_size)
        if call.method == "train_on_batch":
            self._take_from_batch(arguments)
            return
        self._seeds.fold()
        session = self._member.session
        callback = keras_calls.FitCallback(
            self._begin_fit,
            lambda epoch: session.begin_epoch(self._stopping.fit, epoch, self._controller.run),
            self._stopping.after_epoch,
        )
        first = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs=None: self._epochs.synchronize()
        )
        stack.enter_context(
            keras_calls.fitting(call.model, arguments, self._stopping, first, callback)
        )

    def _check_batch_size(self, batch_size: int) -> None:
        """Raises a ValueError if the batch size of a fit cannot be."""
        inputs.check_divisible(batch_size, self._aggregate)

    def _take_from_batch(self, arguments: dict[str, Any]) -> None:
        """Leaves this worker's share of the batch that `train_on_batch` is given."""
        index = (self._controller.run + self.worker_index) % self._aggregate
        for name in ("x", "y", "sample_weight"):
            if arguments.get(name) is not None:
                arguments[name] = inputs.piece_of_arrays(arguments[name], index, self._aggregate)

    def _begin_fit(self) -> int | None:
        """Meets the others; returns where to begin if the job is in progress."""
        started, fit = self._member.session.wait_started(), self._stopping.fit
        if self._common_seed != started.job_seed:
            # The service that this worker has started again has learned of the job meanwhile.
            self._set_common_seed()
        if started.in_progress and fit < started.epoch.fit:
            return sys.maxsize
        if started.in_progress and fit == started.epoch.fit:
            self._controller.start_at(started.epoch.run)
            return started.epoch.epoch
        self._epochs.begin_fit(fit)
        return None


def _check_model(model: Any) -> None:
    if getattr(model, "jit_compile", None) is True:
        raise ValueError(
            "Expected `jit_compile` to be False or 'auto', because gradients leave a compiled "
            "step through Python, which XLA cannot do. Received: jit_compile=True. Compile the "
            "model with `model.compile(..., jit_compile=False)`."
        )
