"""Tells the strategy which Keras method is calling it, by wrapping methods of keras.Model.

Keras gives a strategy no way to know: fit, evaluate and predict distribute their input by the same
call, and each process prints a progress bar and decides to stop on its own.
"""

import contextlib
import contextvars
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tf_syncdist.strategies import adapter, inputs
from tf_syncdist.strategies.stopping import Stopping

_METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
TRAINING = ("fit", "train_on_batch")
# Methods that look at a whole model, and say so to strategies that have something to fetch.
_LOOKING = ("get_weights", "save", "save_weights", "export")
_WITH_PROGRESS_BAR = ("fit", "evaluate", "predict")

# In place of an epoch: a fit does one batch of its last epoch.
ONLY_LOOK = -1


class KerasCall:
    """A call of one of Keras' methods that is in progress.

    Args:
        method: Its name.
        model: The model.
        batch_size: What the user passed, or Keras' default; `None` if the input is batched.
        examples: How many examples the input has, without those kept for validation.
    """

    def __init__(
        self, method: str, model: keras.Model, batch_size: int | None, examples: int
    ) -> None:
        self.method = method
        self.model = model
        self.batch_size = batch_size
        self.batches = -(-examples // (batch_size or 1))
        self.has_input = False

    @property
    def trains(self) -> bool:
        """Whether the method trains the model."""
        return self.method in TRAINING

    @property
    def is_standard(self) -> bool:
        """Whether the model trains by Keras' own train_step."""
        own = type(self.model).train_step is keras.Model.train_step
        return self.trains and own and "train_step" not in vars(self.model)

    def takes_training_input(self) -> bool:
        """Returns whether the input being distributed is that of training; true once per fit."""
        if self.method != "fit" or self.has_input:
            return False
        self.has_input = True
        return True


_current: contextvars.ContextVar[KerasCall | None] = contextvars.ContextVar(
    "tf_syncdist_keras_call", default=None
)
_strategies: weakref.WeakSet = weakref.WeakSet()
_fits: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def current() -> KerasCall | None:
    """Returns the innermost Keras call in progress."""
    return _current.get()


def install(strategy: tf.distribute.Strategy) -> None:
    """Wraps Keras' methods, once, and takes note of a strategy of several workers.

    Models without one of our strategies see no difference.
    """
    if strategy.num_workers > 1:
        _strategies.add(strategy)
    for method in _METHODS:
        original = getattr(keras.Model, method)
        if not hasattr(original, "_tf_syncdist"):
            wrapped = _wrap(original, method)
            wrapped._tf_syncdist = True
            setattr(keras.Model, method, wrapped)
    for method in _LOOKING:
        original = getattr(keras.Model, method)
        if not hasattr(original, "_tf_syncdist"):
            wrapped = _wrap_look(original)
            wrapped._tf_syncdist = True
            setattr(keras.Model, method, wrapped)
    if not isinstance(inspect.getattr_static(keras.Model, "stop_training", None), _StopTraining):
        keras.Model.stop_training = _StopTraining()


def _wrap(original: Callable, method: str) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        strategy = self.distribute_strategy
        handler = getattr(strategy, "_keras_call", None)
        if handler is None:
            if method in TRAINING:
                _check_scope(strategy)
            return original(self, *args, **kwargs)
        try:
            bound = signature.bind_partial(self, *args, **kwargs)
        except TypeError:
            return original(self, *args, **kwargs)  # It says itself what is wrong.
        with handler(method, self, bound.arguments):
            return original(*bound.args, **bound.kwargs)

    return call


def _wrap_look(original: Callable) -> Callable:
    @functools.wraps(original)
    def call(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        look = getattr(self.distribute_strategy, "_before_look", None)
        if look is not None:
            look()
        return original(self, *args, **kwargs)

    return call


def _check_scope(strategy: tf.distribute.Strategy) -> None:
    outside = not tf.distribute.has_strategy() and strategy is tf.distribute.get_strategy()
    if outside and any(s.is_open for s in _strategies):
        raise ValueError(
            "Expected a model that was built under the scope of the strategy of this job. "
            "Received: a model built outside of any scope, which every worker would train on its "
            "own. Build and compile it within `with strategy.scope():`; for a model that each "
            'worker is to train alone use `with tf.distribute.OneDeviceStrategy("/cpu:0").scope():`'
        )


@contextlib.contextmanager
def calling(
    method: str, model: keras.Model, arguments: dict[str, Any], quiet: bool
) -> Iterator[KerasCall]:
    """Marks a Keras call as the one in progress.

    Args:
        method: The method.
        model: The model.
        arguments: Its arguments by name; `verbose` is turned off here if `quiet` and not given.
        quiet: Whether this worker prints no progress bar.
    """
    progress = method in _WITH_PROGRESS_BAR
    name = "validation_data" if method == "fit" else "x"
    if isinstance(arguments.get(name), inputs.WorkerDataset):
        raise ValueError(
            f"Expected a dataset that is not distributed as `{name}` of `{method}`, because every "
            "worker evaluates and predicts all of it. Received: one that the strategy has "
            "distributed, of which each worker has a share. Pass the dataset that it was made of."
        )
    if quiet and progress and arguments.get("verbose", "auto") == "auto":
        arguments["verbose"] = 0
    arrays = progress and _is_arrays(arguments.get("x"))
    batch_size = (arguments.get("batch_size") or 32) if arrays else None
    examples = 0
    if arrays:
        share = 1.0 - (arguments.get("validation_split") or 0.0)
        kept = share if arguments.get("validation_data") is None else 1.0
        examples = math.floor(len(tf.nest.flatten(arguments["x"])[0]) * kept)
    call = KerasCall(method, model, batch_size, examples)
    # What is distributed already is not distributed again; the first input that is, is another.
    call.has_input = isinstance(arguments.get("x"), tf.distribute.DistributedDataset)
    token = _current.set(call)
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def _is_arrays(data: Any) -> bool:
    leaves = tf.nest.flatten(data)
    return bool(leaves) and all(hasattr(v, "shape") and hasattr(v, "dtype") for v in leaves)


class FitCallback(keras.callbacks.Callback):
    """Meets the other workers where a fit begins and around each epoch.

    Args:
        on_begin: Called before the first run of a fit; returns the epoch to begin with if it is
            not the one that was asked for, as on a worker that has come later; `ONLY_LOOK` if the
            fit is over for the others.
        on_epoch_begin: Called with an epoch before its first run.
        on_epoch: Called after an epoch.
    """

    def __init__(
        self,
        on_begin: Callable[[], int | None],
        on_epoch_begin: Callable[[int], None],
        on_epoch: Callable[[], None],
    ) -> None:
        super().__init__()
        self._on_begin = on_begin
        self._on_epoch_begin = on_epoch_begin
        self._on_epoch = on_epoch
        self._has_set_epoch = False
        self._only_looks = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Is called by Keras."""
        epoch = self._on_begin()
        self._only_looks = epoch == ONLY_LOOK
        if self._only_looks:
            epoch = max(0, self.params["epochs"] - 1)
        if epoch is not None:
            # Keras reads it when all callbacks have been called.
            adapter.set_initial_epoch(self.model, min(epoch, self.params["epochs"]))
            self._has_set_epoch = True

    def on_train_end(self, logs: dict | None = None) -> None:
        """Is called by Keras."""
        if self._has_set_epoch:
            # The next fit is to begin with its own.
            adapter.set_initial_epoch(self.model, None)
        if self._only_looks:
            # Nothing has stopped the fit of the others, as far as the program is told.
            self.model.stop_training = False

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        if self._only_looks:
            self.model.stop_training = True

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self._on_epoch_begin(epoch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self._on_epoch()


@contextlib.contextmanager
def fitting(
    model: keras.Model,
    arguments: dict[str, Any],
    stopping: Stopping,
    first: keras.callbacks.Callback,
    last: FitCallback,
) -> Iterator[None]:
    """Adds callbacks to a fit, around the user's, and makes its stop a common one."""
    callbacks = arguments.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(first)
        callbacks.append(last)
    else:
        arguments["callbacks"] = [first, *tf.nest.flatten(callbacks or []), last]
    stopping.begin_fit()
    _fits[model] = stopping
    try:
        yield
    finally:
        del _fits[model]
    # A program may ask after the fit; all workers have stopped alike. After an error nobody knows.
    vars(model)["stop_training"] = stopping.stopped


class _StopTraining:
    """`model.stop_training`: set, it is a wish; read, it says whether all workers stop now."""

    def __get__(self, model: keras.Model | None, owner: type) -> Any:
        if model is None:
            return self
        stopping = _fits.get(model)
        if stopping is not None:
            return stopping.stopped
        try:
            return vars(model)["stop_training"]
        except KeyError:
            raise AttributeError("stop_training") from None

    def __set__(self, model: keras.Model, value: bool) -> None:
        vars(model)["stop_training"] = value
        stopping = _fits.get(model)
        if stopping is not None:
            stopping.wish(value)
