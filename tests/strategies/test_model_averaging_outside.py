"""Model averaging: everything outside of training sees the central model, and learners take over
what is written there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist import ModelAveragingStrategy

from ..multi_worker.programs.averaging_rule import Reference, dealt
from .averaging import BATCH, PARTS, NotingDense, X, Y, close, dense, fit, sgd

pytestmark = pytest.mark.timeout(240)


class Trained(NamedTuple):
    """A model that two learners have trained.

    Args:
        strategy: The strategy.
        model: The model.
        central: The central model's values after the last run.
    """

    strategy: ModelAveragingStrategy
    model: keras.Model
    central: list[np.ndarray]


@pytest.fixture(scope="module")
def trained() -> Trained:
    strategy = ModelAveragingStrategy(2)
    with strategy.scope():
        model = dense(sgd, metrics=["mae"])
    trace, _ = fit(model, X, Y, batch_size=BATCH, shuffle=False)
    return Trained(strategy, model, trace.values[-1])


def saved(trained: Trained, directory: Path) -> list[np.ndarray]:
    trained.model.save(directory / "model.keras")
    objects = {"NotingDense": NotingDense}
    return keras.models.load_model(directory / "model.keras", objects).get_weights()


def saved_weights(trained: Trained, directory: Path) -> list[np.ndarray]:
    trained.model.save_weights(directory / "model.weights.h5")
    other = dense(sgd)
    other.load_weights(directory / "model.weights.h5")
    return other.get_weights()


def checkpointed(trained: Trained, directory: Path) -> list[np.ndarray]:
    path = tf.train.Checkpoint(model=trained.model).save(directory / "checkpoint")
    other = dense(sgd)
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    return other.get_weights()


def read_in_a_graph(trained: Trained, directory: Path) -> list[np.ndarray]:
    read = tf.function(lambda: [v.value + 0.0 for v in trained.model.weights])
    return [v.numpy() for v in read()]


def cloned(trained: Trained, directory: Path) -> list[np.ndarray]:
    other = keras.models.clone_model(trained.model)
    other.set_weights(trained.model.get_weights())
    return other.get_weights()


@pytest.mark.parametrize("way", [saved, saved_weights, checkpointed, read_in_a_graph, cloned])
def test_what_is_read_is_the_central_model(
    trained: Trained, way: Callable[[Trained, Path], list[np.ndarray]], tmp_path: Path
) -> None:
    apart = trained.strategy.distances()
    assert min(apart) > 1e-4
    for value, expected in zip(way(trained, tmp_path), trained.central, strict=True):
        np.testing.assert_array_equal(value, expected)
    # Looking leaves learners where they are.
    assert trained.strategy.distances() == apart


def test_evaluate_and_predict_use_the_central_model(trained: Trained) -> None:
    apart = trained.strategy.distances()
    plain = dense(sgd, metrics=["mae"])
    plain.set_weights(trained.central)
    for batch_size in (20, 88):
        given = {"batch_size": batch_size, "verbose": 0}
        close(trained.model.evaluate(X, Y, **given), plain.evaluate(X, Y, **given), 1e-5)
        predicted = trained.model.predict(X, **given)
        assert predicted.shape == Y.shape
        close(predicted, plain.predict(X, **given), 1e-5)
    close(trained.model.test_on_batch(X, Y), plain.test_on_batch(X, Y), 1e-5)
    close(trained.model.predict_on_batch(X), plain.predict_on_batch(X), 1e-5)
    close(trained.model(X), plain(X), 1e-5)
    assert trained.strategy.distances() == apart


def test_validation_within_a_fit_uses_the_central_model() -> None:
    strategy = ModelAveragingStrategy(2)
    with strategy.scope():
        model = dense(sgd)
    ends: list[list[np.ndarray]] = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(model.get_weights())
    )
    _, history = fit(
        *(model, X, Y),
        validation_data=(X[:30], Y[:30]),
        batch_size=BATCH,
        epochs=2,
        callbacks=[note],
    )
    plain = dense(sgd)
    for weights, loss in zip(ends, history.history["val_loss"], strict=True):
        plain.set_weights(weights)
        close(loss, plain.evaluate(X[:30], Y[:30], verbose=0), 1e-5)


def set_weights(model: keras.Model, values: list[np.ndarray], directory: Path) -> None:
    model.set_weights(values)


def load_weights(model: keras.Model, values: list[np.ndarray], directory: Path) -> None:
    other = dense(sgd)
    other.set_weights(values)
    other.save_weights(directory / "other.weights.h5")
    model.load_weights(directory / "other.weights.h5")


def restore(model: keras.Model, values: list[np.ndarray], directory: Path) -> None:
    other = dense(sgd)
    other.set_weights(values)
    path = tf.train.Checkpoint(model=other).save(directory / "other")
    tf.train.Checkpoint(model=model).restore(path).expect_partial()


def assign(model: keras.Model, values: list[np.ndarray], directory: Path) -> None:
    for variable, value in zip(model.weights, values, strict=True):
        variable.assign(value)


def assign_in_a_graph(model: keras.Model, values: list[np.ndarray], directory: Path) -> None:
    tf.function(lambda: assign(model, values, directory))()


@pytest.mark.parametrize("way", [set_weights, load_weights, restore, assign, assign_in_a_graph])
def test_what_is_written_all_learners_take_over(
    trained: Trained, way: Callable[[keras.Model, list[np.ndarray], Path], None], tmp_path: Path
) -> None:
    strategy, model = trained.strategy, trained.model
    fit(model, X, Y, batch_size=BATCH)
    assert min(strategy.distances()) > 1e-4
    values = [w + 0.5 for w in model.get_weights()]
    way(model, values, tmp_path)
    for value, expected in zip(model.get_weights(), values, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert strategy.distances() == [0.0, 0.0]
    for slot in model.optimizer.variables[2:]:
        slot.assign(tf.zeros(slot.shape))
    model.layers[0].noted.clear()
    model.optimizer.learning_rate = 0.0
    model.train_on_batch(X[:16], Y[:16])
    for noted in model.layers[0].noted:
        np.testing.assert_array_equal(noted.kernel, values[0])
    # The central model begins without momentum.
    for value, expected in zip(model.get_weights(), values, strict=True):
        np.testing.assert_array_equal(value, expected)
    model.optimizer.learning_rate = 0.02


def test_a_checkpoint_of_a_callback_holds_the_central_model(tmp_path: Path) -> None:
    strategy = ModelAveragingStrategy(2)
    with strategy.scope():
        model = dense(sgd)
    keep = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}.weights.h5", save_weights_only=True, save_freq="epoch"
    )
    trace, _ = fit(model, X, Y, batch_size=BATCH, epochs=2, callbacks=[keep])
    plain = dense(sgd)
    for epoch in (1, 2):
        plain.load_weights(tmp_path / f"{epoch}.weights.h5")
        after = trace.values[6 * epoch - 1]
        for value, expected in zip(plain.get_weights(), after, strict=True):
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("kind", ["keras", "tf_syncdist"])
def test_a_fit_goes_on_from_a_backup_with_the_central_model(tmp_path: Path, kind: str) -> None:
    from tf_syncdist import callbacks

    class Cut(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    def backup() -> keras.callbacks.Callback:
        if kind == "keras":
            return keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return callbacks.BackupAndRestore(tmp_path / "backup")

    begun: list[Any] = []
    for attempt in (0, 1):
        strategy = ModelAveragingStrategy(2)
        with strategy.scope():
            model = dense(sgd)
        note = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs, m=model: begun.append((epoch, m.get_weights()))
        )
        cuts = [Cut()] if not attempt else []
        try:
            fit(model, X, Y, batch_size=BATCH, epochs=3, callbacks=[backup(), note, *cuts])
        except KeyboardInterrupt:
            ended = model.get_weights()
    assert [epoch for epoch, _ in begun] == [0, 1, 2]
    for value, expected in zip(begun[-1][1], ended, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert len(model.layers[0].noted) == 12
    # All learners begin with what the backup holds.
    for noted in model.layers[0].noted[:2]:
        np.testing.assert_array_equal(noted.kernel, ended[0])


def test_statistics_of_batch_normalisation_are_the_mean_of_the_learners() -> None:
    learners = 3
    strategy = ModelAveragingStrategy(learners)
    with strategy.scope():
        norm = keras.layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((6,)), norm, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(
            (norm.moving_mean.numpy(), norm.moving_variance.numpy())
        )
    )
    fit(model, X, Y, batch_size=BATCH, epochs=2, shuffle=False, callbacks=[note])
    means, variances = np.zeros((learners, 6)), np.ones((learners, 6))
    assert len(seen) == 8
    for run, (mean, variance) in enumerate(seen):
        batches = [PARTS[(run * learners + i) % len(PARTS)][0] for i in range(learners)]
        means = 0.5 * means + 0.5 * np.array([b.mean(0) for b in batches])
        variances = 0.5 * variances + 0.5 * np.array([b.var(0) for b in batches])
        close(mean, means.mean(0), 1e-5)
        close(variance, variances.mean(0), 1e-5)
    plain = keras.Sequential(
        [keras.Input((6,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    plain.set_weights(model.get_weights())
    close(model.predict(X, verbose=0), plain.predict(X, verbose=0), 1e-5)


def test_a_fit_ends_with_the_mean_of_what_optimizers_average_over_time() -> None:
    def averaging_sgd() -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(0.02, momentum=0.9, use_ema=True, ema_momentum=0.7)

    strategy = ModelAveragingStrategy(2)
    with strategy.scope():
        model = dense(averaging_sgd)
    reference = Reference(lambda: dense(averaging_sgd), model.get_weights(), 2)
    trace, _ = fit(model, X, Y, batch_size=BATCH, shuffle=False)
    for batches in dealt(PARTS, 1, 2, 6):
        reference.step(batches)
    for learner in reference.models:
        learner.optimizer.finalize_variable_values(learner.trainable_variables)
    expected = np.mean([np.concatenate([w.ravel() for w in m.get_weights()])
                        for m in reference.models], axis=0)  # fmt: skip
    close(np.concatenate([w.ravel() for w in model.get_weights()]), expected)
    assert np.max(np.abs(model.get_weights()[0] - trace.values[-1][0])) > 1e-3
    assert strategy.distances() == [0.0, 0.0]
