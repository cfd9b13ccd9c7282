"""A single worker is plain Keras, bit for bit, whichever strategy it has: f6 of Jin et al."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_syncdist

STRATEGIES = {
    "sync_replicas": tf_syncdist.SyncReplicasStrategy,
    "model_averaging": tf_syncdist.ModelAveragingStrategy,
    "elastic_averaging": tf_syncdist.ElasticAveragingStrategy,
    "gossip": tf_syncdist.GossipStrategy,
    "async": tf_syncdist.AsyncStrategy,
}
OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
}
RANDOM = np.random.RandomState(1)
X = RANDOM.randn(48, 6).astype("float32")
Y = X[:, :3].argmax(1)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)


def model_of(optimizer: str, scope: Any) -> keras.Model:
    """Returns a model; it is the same whenever it is made."""
    keras.utils.set_random_seed(3)
    with scope:
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.2),
                keras.layers.Dense(3),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(OPTIMIZERS[optimizer](), loss, metrics=["accuracy"], steps_per_execution=2)
    return model


def trajectory(model: keras.Model) -> tuple[list[str], dict[str, list[float]]]:
    """Trains a model, and returns fingerprints after each epoch and what Keras has noted."""
    seen = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            variables = [*self.model.weights, *self.model.optimizer.variables]
            seen.append(tf_syncdist.variables_sha256(variables))

    fit = {"batch_size": 8, "shuffle": False, "verbose": 0, "callbacks": [Note()]}
    history = model.fit(X, Y, epochs=2, validation_data=(X, Y), **fit).history
    model.fit(X, Y, epochs=1, **fit)
    return seen, history


plain: dict[str, Any] = {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_fit_has_the_same_bits(name: str, optimizer: str) -> None:
    if optimizer not in plain:
        plain[optimizer] = trajectory(model_of(optimizer, contextlib.nullcontext()))
    strategy = STRATEGIES[name]()
    assert trajectory(model_of(optimizer, strategy.scope())) == plain[optimizer]
    strategy.close()


def loop(strategy: tf.distribute.Strategy) -> list[str]:
    """Trains in a custom loop, in a graph and without, and returns fingerprints of every step."""
    model = model_of("momentum", strategy.scope())
    optimizer = model.optimizer

    def replica_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def in_function(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return strategy.run(replica_step, (x, y))

    seen = []
    for start in range(0, 48, 8):
        step = in_function if start < 32 else lambda x, y: strategy.run(replica_step, (x, y))
        step(tf.constant(X[start : start + 8]), tf.constant(Y[start : start + 8]))
        seen.append(tf_syncdist.variables_sha256([*model.weights, *optimizer.variables]))
    return seen


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_custom_loop_has_the_same_bits(name: str) -> None:
    if "loop" not in plain:
        plain["loop"] = loop(tf.distribute.get_strategy())
    strategy = STRATEGIES[name]()
    assert loop(strategy) == plain["loop"]
    assert strategy.local_report().rounds == 6
    strategy.close()


def test_the_report_of_one_worker() -> None:
    strategy = tf_syncdist.GossipStrategy()
    model = model_of("adam", strategy.scope())
    model.fit(X, Y, batch_size=8, verbose=0)
    report = strategy.report()
    assert (report.runs, report.own.exchanges, report.centre_bytes) == (6, 0, 0)
    assert str(report) == "6 runs by a single worker"
    strategy.close()
