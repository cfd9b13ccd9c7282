"""The number of learners that a fit finds out by itself, and arguments that cannot be."""

import itertools
import re
import threading
import time
import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist import ModelAveragingStrategy
from tf_syncdist.strategies import devices, learner_tuning

from .averaging import BATCH, X, Y, close, fit, sgd

pytestmark = pytest.mark.timeout(240)


class Waiting(keras.layers.Layer):
    """Waits for a device that other learners do not use meanwhile."""

    # How many wait at the same time: now, and at most so far.
    waiting = most = 0
    lock = threading.Lock()

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not tf.is_symbolic_tensor(inputs):
            return inputs

        def wait() -> np.float32:
            with Waiting.lock:
                Waiting.waiting += 1
                Waiting.most = max(Waiting.most, Waiting.waiting)
            time.sleep(0.01)
            with Waiting.lock:
                Waiting.waiting -= 1
            return np.float32(0)

        return inputs + tf.reshape(tf.numpy_function(wait, [], tf.float32), ())


def noisy(**compiled: Any) -> keras.Model:
    """Returns a model with all kinds of state."""
    keras.utils.set_random_seed(7)
    layers = [keras.Input((6,)), Waiting(), keras.layers.Dense(5, activation="tanh")]
    layers += [keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dropout(0.3)]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **compiled)
    return model


def arrays() -> tuple[tuple, dict[str, Any]]:
    return (X, Y), {"batch_size": BATCH}


def batched() -> tuple[tuple, dict[str, Any]]:
    return (tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH),), {}


def trained(strategy: ModelAveragingStrategy, kind: Any, **compiled: Any) -> list[Any]:
    with strategy.scope():
        model = noisy(**compiled)
    args, given = kind()
    _, history = fit(model, *args, epochs=2, **given)
    optimizer = [v.numpy() for v in model.optimizer.variables]
    return [*model.get_weights(), *optimizer, *history.history["loss"], *history.history["mae"]]


def test_the_number_of_learners_follows_from_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock on which a run takes 2 ms, and 0.8 ms more for each learner."""
    measure = learner_tuning._runs_per_second

    def rate(model: keras.Model, batch: Any, count: int, clock: Any) -> float:
        ticks = itertools.count()
        return measure(model, batch, count, lambda: next(ticks) * (0.002 + 0.0008 * count))

    monkeypatch.setattr(learner_tuning, "_runs_per_second", rate)
    monkeypatch.setattr(Waiting, "most", 0)
    strategy, model = automatic()
    fit(model, X, Y, batch_size=BATCH)
    assert strategy.num_learners == 3
    # Learners do not wait for one another.
    assert Waiting.most > 1


@pytest.mark.parametrize("kind", [arrays, batched])
def test_measuring_leaves_no_trace(
    kind: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pays_until(3, monkeypatch)
    strategy = ModelAveragingStrategy("auto")
    assert strategy.num_learners == 1
    found = trained(strategy, kind)
    learners = strategy.num_learners
    assert learners == 3
    assert strategy.correction == 1 / learners
    expected = trained(ModelAveragingStrategy(learners), kind)
    for value, wanted in zip(found, expected, strict=True):
        close(value, wanted, 1e-5)
    assert strategy.local_report().rounds == 2 * -(-11 // learners)
    printed = capfd.readouterr().err
    check_table(printed, learners)
    assert ("TF_NUM_INTRAOP_THREADS=1 in the environment" in printed) == devices.cuts_operations()


def test_operations_are_cut_unless_somebody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if tf.config.list_logical_devices("GPU"):
        pytest.skip("is about CPUs")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    for threads, cut in (("", True), ("0", True), ("2", True), ("1", False), ("one", True)):
        monkeypatch.setenv(devices.INTRAOP_THREADS, threads)
        assert devices.cuts_operations() == cut
    monkeypatch.setenv(devices.INTRAOP_THREADS, "")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert not devices.cuts_operations()


def check_table(printed: str, learners: int) -> None:
    """Checks that the table is printed once, and that it is what the rule makes of it."""
    assert printed.count("learners  examples/s    gain") == 1
    rows = re.findall(r"^ +(\d+) +(\d+) +(?:([+-]\d+) %)?( +<- kept)?$", printed, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == learners + 1
    assert [bool(kept) for *_, kept in rows] == [n == learners for n in range(1, len(rows) + 1)]
    gains = [int(gain) for _, _, gain, _ in rows[1:]]
    assert min(gains[:-1]) >= 10 >= gains[-1]
    for (_, before, *_), (_, after, gain, _) in zip(rows, rows[1:], strict=False):
        assert 100 * (int(after) / int(before) - 1) == pytest.approx(int(gain), abs=1.5)


def test_a_second_fit_does_not_measure_again(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pays_until(3, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy = ModelAveragingStrategy("auto", correction=0.9)
    with strategy.scope():
        models = [noisy(), noisy()]
    # More learners make it unstable.
    with pytest.warns(UserWarning, match="Received: correction=0.9") as told:
        for model in (*models, models[0]):
            fit(model, X, Y, batch_size=BATCH)
    assert len([w for w in told if "averaging is stable" in str(w.message)]) == 1
    assert capfd.readouterr().err.count("learners  examples/s") == 1
    assert strategy.num_learners == 3 and strategy.correction == 0.9
    assert max(strategy.distances()) > 0


def test_of_data_of_unknown_length_nothing_is_tried(capfd: pytest.CaptureFixture[str]) -> None:
    strategy = ModelAveragingStrategy("auto")
    with strategy.scope():
        model = noisy()
    parts = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH).filter(lambda x, y: True)
    trace, _ = fit(model, parts, may_end=True)
    assert strategy.num_learners == 1 and trace.runs == 11
    assert "learners_per_device='auto' is 1, since" in capfd.readouterr().err


def test_an_error_of_the_model_is_told_as_it_is() -> None:
    strategy = ModelAveragingStrategy("auto")
    with strategy.scope():
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
        model.compile(sgd(), "sparse_categorical_crossentropy")
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        model.fit(X, np.full(len(X), 7), batch_size=BATCH, verbose=0)
    assert strategy.num_learners == 1


class Growing(keras.Model):
    """Makes a layer and an optimizer where it is trained first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = keras.layers.Dense(4), keras.layers.Dense(1)
        self.waits = Waiting()
        self.second = keras.optimizers.Adagrad(0.05)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.body(x)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            found = self.head(self.body(self.waits(x, training=True)))
            loss = tf.reduce_mean((found - y) ** 2)
        for optimizer, layer in ((self.optimizer, self.body), (self.second, self.head)):
            optimizer.apply(tape.gradient(loss, layer.weights), layer.weights)
        return {"loss": loss}


def grown(strategy: ModelAveragingStrategy) -> list[np.ndarray]:
    keras.utils.set_random_seed(7)
    with strategy.scope():
        model = Growing()
        model.compile(sgd())
    fit(model, X, Y, batch_size=BATCH)
    return [*model.get_weights(), *(v.numpy() for v in model.second.variables)]


def test_what_training_makes_begins_as_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pays_until(3, monkeypatch)
    strategy = ModelAveragingStrategy("auto")
    found = grown(strategy)
    assert strategy.num_learners == 3
    expected = grown(ModelAveragingStrategy(strategy.num_learners))
    for value, wanted in zip(found, expected, strict=True):
        close(value, wanted, 1e-5)


def automatic() -> tuple[ModelAveragingStrategy, keras.Model]:
    """Returns a strategy that measures, and a model of it."""
    strategy = ModelAveragingStrategy("auto")
    with strategy.scope():
        return strategy, noisy()


def pays_until(learners: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets more learners not pay, whatever the machine says."""
    measure = learner_tuning._runs_per_second

    def rate(model: keras.Model, batch: Any, count: int, clock: Any) -> float:
        measure(model, batch, count, clock)
        return 100.0 if count <= learners else 1.0

    monkeypatch.setattr(learner_tuning, "_runs_per_second", rate)


def test_learners_that_were_only_tried_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pays_until(1, monkeypatch)
    strategy, model = automatic()
    fit(model, X, Y, batch_size=BATCH)
    assert strategy.num_learners == 1 and strategy.distances() == [0.0]
    assert strategy._learners._copies == {}


def test_learners_for_which_there_is_no_memory_are_not_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pays_until(9, monkeypatch)
    measure = learner_tuning._runs_per_second

    def rate(model: keras.Model, batch: Any, count: int, clock: Any) -> float:
        if count == 3:
            raise tf.errors.ResourceExhaustedError(None, None, "no memory")
        return measure(model, batch, count, clock)

    monkeypatch.setattr(learner_tuning, "_runs_per_second", rate)
    strategy, model = automatic()
    fit(model, X, Y, batch_size=BATCH)
    assert strategy.num_learners == 2


def test_an_error_in_measuring_leaves_it_to_the_next_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pays_until(2, monkeypatch)
    strategy, model = automatic()
    # Keras up to 3.10 wraps it.
    with pytest.raises((ValueError, RuntimeError, tf.errors.InvalidArgumentError)):
        model.fit(X[:, :3], Y, batch_size=BATCH, verbose=0)
    assert strategy.num_learners == 1
    fit(model, X, Y, batch_size=BATCH)
    assert strategy.num_learners == 2


def test_sparse_input_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pays_until(2, monkeypatch)
    strategy = ModelAveragingStrategy("auto")
    with strategy.scope():
        sparse = keras.Input((6,), sparse=True)
        model = keras.Model(sparse, keras.layers.Dense(1)(sparse))
        model.compile(sgd(), "mse")
    data = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(X), Y)).batch(BATCH)
    model.fit(data, verbose=0)
    assert strategy.num_learners == 2


def test_a_custom_loop_before_the_fit_has_one_learner_for_good(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pays_until(2, monkeypatch)
    strategy, model = automatic()

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        strategy.run(lambda x, y: model.train_step((x, y)), (x, y))

    for _ in range(3):
        step(tf.constant(X[:BATCH]), tf.constant(Y[:BATCH]))
    fit(model, X, Y, batch_size=BATCH)
    assert strategy.num_learners == 1 and strategy.local_report().rounds == 3 + 11
    assert "is 1, since something was trained before this fit" in capfd.readouterr().err


def test_the_validation_of_a_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pays_until(2, monkeypatch)
    strategy = ModelAveragingStrategy("auto")
    with strategy.scope():
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    given = strategy.experimental_distribute_dataset(data)
    losses = model.fit(given, epochs=2, verbose=0, validation_data=data).history["val_loss"]
    assert losses == [model.evaluate(data, verbose=0)] * 2
    assert strategy.num_learners == 1


def test_workers_must_be_given_the_same() -> None:
    def described(*args: Any, **kwargs: Any) -> str:
        return ModelAveragingStrategy(*args, **kwargs)._described()

    others = [
        described(2),
        described("auto"),
        described(correction=0.1),
        described(central_momentum=0.5),
        described(period=2),
    ]
    assert len({described(), *others}) == 6
    assert described() == described(np.int64(1), period=np.int64(1))
    assert described().startswith("ModelAveragingStrategy(learners_per_device=1, correction=None, ")


def test_a_report_says_how_often_learners_were_averaged_and_how_far_they_are() -> None:
    strategy = ModelAveragingStrategy(2, period=3)
    with strategy.scope():
        model = noisy()
    assert strategy.report().learners == (0.0, 0.0) and strategy.report().distance is None
    fit(model, X, Y, batch_size=BATCH, epochs=2)
    report = strategy.report()
    assert (report.runs, report.own.mixed, report.own.staleness_max) == (12, 4, 0)
    assert report.learners == tuple(strategy.distances())
    size = sum(v.numpy().size for v in model.trainable_variables)
    length = sum(np.sum(v.numpy().astype("f8") ** 2) for v in model.trainable_variables)
    squares = sum(length * d**2 for d in report.learners)
    assert report.distance == pytest.approx(np.sqrt(squares / size / 2), rel=1e-6)
    assert "averaged in 4 of them" in str(report)
    alone = ModelAveragingStrategy()
    assert str(alone.report()) == "0 runs by a single worker with 1 learner"


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"learners_per_device": 0}, "learners_per_device=0"),
        ({"learners_per_device": -2}, "learners_per_device=-2"),
        ({"learners_per_device": 1.5}, "learners_per_device=1.5"),
        ({"learners_per_device": True}, "learners_per_device=True"),
        ({"learners_per_device": "many"}, "learners_per_device='many'"),
        ({"learners_per_device": None}, "learners_per_device=None"),
        ({"correction": 0}, "correction=0"),
        ({"correction": -0.1}, "correction=-0.1"),
        ({"correction": float("nan")}, "correction=nan"),
        ({"correction": float("inf")}, "correction=inf"),
        ({"correction": "0.1"}, "correction='0.1'"),
        ({"central_momentum": -0.1}, "central_momentum=-0.1"),
        ({"central_momentum": 1}, "central_momentum=1"),
        ({"central_momentum": float("nan")}, "central_momentum=nan"),
        ({"central_momentum": None}, "central_momentum=None"),
        ({"period": 0}, "period=0"),
        ({"period": 2.0}, "period=2.0"),
        ({"period": True}, "period=True"),
        ({"period": None}, "period=None"),
        ({"transport": "pigeon"}, "pigeon"),
        ({"limit_gbps": -1.0}, "-1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], received: str) -> None:
    with pytest.raises(ValueError, match=re.escape(received)) as refused:
        ModelAveragingStrategy(**arguments)
    (name,) = arguments
    assert name in str(refused.value)


@pytest.mark.parametrize("learners", [2, 4, np.int64(4)])
def test_a_correction_that_overshoots_is_told_with_its_bound(learners: int) -> None:
    bound = 2 / (learners + 1)
    with pytest.warns(UserWarning, match=re.escape(f"2 / (k + 1) = {bound:.3g};")) as told:
        ModelAveragingStrategy(learners, correction=bound + 0.01)
    (warning,) = told
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelAveragingStrategy(learners, correction=bound - 0.01)
        # One learner in all is not corrected.
        ModelAveragingStrategy(1, correction=1.5)
