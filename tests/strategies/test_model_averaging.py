"""Model averaging in one process: central model and learners follow the pure rule."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist import ModelAveragingStrategy

from . import averaging
from .averaging import BATCH, PARTS, X, Y, check_follows, close, dense, fit, sgd

pytestmark = pytest.mark.timeout(240)


def adam() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(0.01)


def dropping() -> keras.optimizers.Optimizer:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.02, 0.002])
    return keras.optimizers.SGD(schedule, momentum=0.9)


def accumulating() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.02, gradient_accumulation_steps=2)


def scaled() -> keras.optimizers.Optimizer:
    return keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("training", ["fit", "custom loop"])
def test_one_learner_in_all_is_plain_keras_bit_for_bit(
    optimizer: averaging.Optimizer, training: str
) -> None:
    def build() -> keras.Model:
        keras.utils.set_random_seed(5)
        layers = [keras.Input((6,)), keras.layers.Dense(8), keras.layers.BatchNormalization()]
        model = keras.Sequential([*layers, keras.layers.Dropout(0.3), keras.layers.Dense(1)])
        model.compile(optimizer(), "mse", metrics=["mae"])
        model.optimizer.build(model.trainable_variables)
        return model

    def trained(model: keras.Model, run: Callable) -> list[Any]:
        if training == "fit":
            logs = model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0).history
        else:
            step = loop_step(model)
            call = tf.function(lambda x, y: run(step, ((x, y),)))
            logs = [float(call(*map(tf.constant, batch))) for batch in PARTS]
        return [logs, *(v.numpy().tolist() for v in (*model.weights, *model.optimizer.variables))]

    strategy = ModelAveragingStrategy()
    with strategy.scope():
        model = build()
    assert trained(model, strategy.run) == trained(build(), lambda step, args: step(*args))
    assert strategy.distances() == [0.0]


def loop_step(model: keras.Model) -> Callable:
    def step(batch: Any) -> tf.Tensor:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        pairs = zip(gradients, model.trainable_variables, strict=True)
        model.optimizer.apply_gradients(pairs)
        return loss

    return step


@pytest.mark.parametrize(
    ("learners", "optimizer", "rule"),
    [
        (2, sgd, {}),
        (3, adam, {}),
        (3, sgd, {"period": 3}),
        (2, sgd, {"central_momentum": 0.0, "correction": 0.1}),
        (3, accumulating, {"central_momentum": 0.5}),
        (2, scaled, {"correction": 0.6}),
        (3, dropping, {}),
    ],
)
def test_learners_follow_the_rule(
    learners: int, optimizer: averaging.Optimizer, rule: dict[str, Any]
) -> None:
    strategy = ModelAveragingStrategy(learners, **rule)
    if "central_momentum" in rule:
        rule = {**rule, "momentum": rule["central_momentum"]}
        del rule["central_momentum"]
    model, reference = check_follows(strategy, lambda: dense(optimizer), **rule)
    counted = reference.models[0].optimizer.iterations.numpy()
    assert model.optimizer.iterations.numpy() == counted


def test_learners_start_again_where_a_callback_lowers_the_learning_rate() -> None:
    def lowered() -> keras.callbacks.Callback:
        return keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.02 / (1 + 4 * epoch))

    check_follows(ModelAveragingStrategy(2), lambda: dense(sgd), callbacks=[lowered])


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_after_a_restart_learners_are_where_the_central_model_was(momentum: float) -> None:
    strategy = ModelAveragingStrategy(3, central_momentum=momentum)
    with strategy.scope():
        model = dense(lambda: keras.optimizers.SGD(0.05))
    fit(model, X, Y, batch_size=BATCH)
    before, moves = model.get_weights(), strategy.distances()
    assert min(moves) > 1e-4
    # Without a learning rate nothing but the restart moves learners, and nothing but its momentum
    # the central model.
    model.optimizer.learning_rate = 0.0
    model.train_on_batch(X[:24], Y[:24])
    apart = strategy.distances()
    assert apart[0] == apart[1] == apart[2]
    kernel = model.layers[0].noted[-1].kernel
    np.testing.assert_array_equal(kernel, before[0])
    if momentum:
        # Its momentum is not forgotten in a restart.
        assert apart[0] > 1e-4
    else:
        assert apart[0] == 0.0
        for value, expected in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(value, expected)


def test_several_steps_in_one_execution_are_as_many_runs() -> None:
    def build(**compiled: Any) -> keras.Model:
        return dense(sgd, **compiled)

    finals = []
    for steps in (1, 4):
        strategy = ModelAveragingStrategy(2)
        with strategy.scope():
            model = build(steps_per_execution=steps)
        fit(model, X, Y, batch_size=BATCH, epochs=2, shuffle=False)
        assert len(model.layers[0].noted) == 2 * 2 * 6
        finals.append(model.get_weights())
    for one, other in zip(*finals, strict=True):
        close(one, other)
