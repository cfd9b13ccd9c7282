"""What tests of model averaging train, and how they look at a learner from outside."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import tf_syncdist

from ..multi_worker.programs.averaging_rule import Batch, Reference, dealt

BATCH, BATCHES = 8, 11
_random = np.random.RandomState(0)
# The first number of an example tells which one it is.
X = _random.randn(BATCH * BATCHES, 6).astype("float32")
X[:, 0] = np.arange(len(X)) / len(X)
Y = (X[:, 1:2] * X[:, 2:3] + X.sum(1, keepdims=True)).astype("float32")
PARTS: list[Batch] = [(X[i : i + BATCH], Y[i : i + BATCH]) for i in range(0, len(X), BATCH)]

Optimizer = Callable[[], keras.optimizers.Optimizer]


class Noted(NamedTuple):
    """What a learner had in one step.

    Args:
        examples: Numbers of its examples.
        kernel: The kernel of the layer, as the forward pass has read it.
    """

    examples: tuple[int, ...]
    kernel: np.ndarray


class NotingDense(keras.layers.Dense):
    """A dense layer that notes its input and its kernel in training."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.noted: list[Noted] = []

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not tf.is_symbolic_tensor(inputs):
            return super().call(inputs)

        def note(inputs: np.ndarray, kernel: np.ndarray) -> np.float32:
            numbers = tuple(round(float(i)) for i in inputs[:, 0] * len(X))
            self.noted.append(Noted(numbers, kernel.copy()))
            return np.float32(0)

        done = tf.numpy_function(note, [inputs, tf.convert_to_tensor(self.kernel)], tf.float32)
        with tf.control_dependencies([done]):
            return super().call(tf.identity(inputs))


def dense(optimizer: Optimizer, seed: int = 3, **compiled: Any) -> keras.Model:
    """Returns a small model whose first layer notes what it is given."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((6,)), NotingDense(5, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer(), "mse", **compiled)
    return model


def sgd() -> keras.optimizers.Optimizer:
    """Returns SGD with momentum."""
    return keras.optimizers.SGD(0.02, momentum=0.9)


class Trace(keras.callbacks.Callback):
    """Notes the central model and the number of batches after every run."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[list[np.ndarray]] = []
        self.rates: list[float] = []
        self.runs = 0
        self.announced: int | None = None

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self.rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self.announced = self.params["steps"]
        self.runs = max(self.runs, batch + 1)
        self.values.append([np.array(v.numpy()) for v in self.model.trainable_variables])


def fit(
    model: keras.Model, *args: Any, may_end: bool = False, **kwargs: Any
) -> tuple[Trace, keras.callbacks.History]:
    """Fits without a word; Keras must not say that data ran out, unless they may end anywhere."""
    trace = Trace()
    callbacks = [*kwargs.pop("callbacks", ()), trace]
    with warnings.catch_warnings():
        # Keras says so of all data whose length it does not know.
        action = "ignore" if may_end else "error"
        warnings.filterwarnings(action, message=".*ran out of data.*")
        warnings.filterwarnings("ignore", message=".*`shuffle=True` was passed.*")
        warnings.filterwarnings("ignore", message=".*__array__ implementation.*")
        history = model.fit(*args, verbose=0, callbacks=callbacks, **kwargs)
    return trace, history


def check_follows(
    strategy: tf_syncdist.ModelAveragingStrategy,
    build: Callable[[], keras.Model],
    epochs: int = 2,
    callbacks: Sequence[Callable[[], keras.callbacks.Callback]] = (),
    tolerance: float = 2e-6,
    **rule: Any,
) -> tuple[keras.Model, Reference]:
    """Fits, and compares every learner and the central model with the pure rule in every run."""
    with strategy.scope():
        model = build()
    weights, learners = model.get_weights(), strategy.num_learners
    trace, _ = fit(
        *(model, X, Y),
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        callbacks=[c() for c in callbacks],
    )
    runs = -(-BATCHES // learners)
    assert (trace.runs, trace.announced) == (runs, runs)
    assert len(trace.values) == epochs * runs
    noted = model.layers[0].noted
    assert len(noted) == epochs * runs * learners
    reference = Reference(build, weights, learners, **rule)
    for run, batches in enumerate(dealt(PARTS, 1, learners, len(trace.values))):
        before = reference.step(batches, trace.rates[run] if callbacks else None)
        there = {n.examples: n.kernel for n in noted[run * learners : (run + 1) * learners]}
        for (x, _), (kernel, *_) in zip(batches, before, strict=True):
            examples = tuple(round(float(i)) for i in x[:, 0] * len(X))
            close(there.pop(examples), kernel, tolerance)
        assert not there
        for value, expected in zip(trace.values[run], reference.central(), strict=True):
            close(value, expected, tolerance)
    moved = [np.max(np.abs(a - b)) for a, b in zip(weights, model.get_weights(), strict=True)]
    assert min(moved) > 0.01
    return model, reference


def close(value: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Checks that two arrays differ by rounding only."""
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)
