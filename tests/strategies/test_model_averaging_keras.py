"""Model averaging in Keras' corners and in custom loops: what learners are given, and do."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist import ModelAveragingStrategy

from ..multi_worker.programs.averaging_rule import Batch, Reference, dealt
from .averaging import BATCH, PARTS, Trace, X, Y, close, dense, fit, sgd

pytestmark = pytest.mark.timeout(240)


def examples_of(model: keras.Model) -> list[tuple[int, ...]]:
    """Returns the examples of all steps since the last call."""
    noted = model.layers[0].noted
    found = [n.examples for n in noted]
    noted.clear()
    return found


def made(learners: int, **compiled: Any) -> tuple[ModelAveragingStrategy, keras.Model]:
    strategy = ModelAveragingStrategy(learners)
    with strategy.scope():
        model = dense(sgd, **compiled)
        model.optimizer.build(model.trainable_variables)
    return strategy, model


def dataset(count: int = len(X), size: int = BATCH) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X[:count], Y[:count])).batch(size)


def everything(steps: list[tuple[int, ...]]) -> list[int]:
    return sorted(sum(map(list, steps), []))


# Which examples.


def test_an_epoch_is_a_pass_over_the_data() -> None:
    _, model = made(2)
    # 50 examples in batches of 8 are 7 batches, so 4 runs; the last one goes on with the next pass.
    for data in ((X[:50], Y[:50]), (dataset(50),)):
        given = {"batch_size": BATCH} if len(data) == 2 else {}
        trace, _ = fit(model, *data, epochs=2, **given)
        assert (trace.runs, trace.announced, len(trace.values)) == (4, 4, 8)
        steps = examples_of(model)
        assert len(steps) == 16
        counts = [everything(steps).count(i) for i in range(50)]
        assert min(counts) == 2 and max(counts) <= 3
        assert all(len(step) == BATCH for step in steps)


def test_a_shuffled_epoch_has_every_example_once() -> None:
    _, model = made(2)
    shuffled = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(len(X)).batch(BATCH)
    for data, given in (((X[:80], Y[:80]), {"batch_size": BATCH}), ((shuffled.take(10),), {})):
        fit(model, *data, epochs=2, **given)
        steps = examples_of(model)
        first, second = steps[:10], steps[10:]
        if given:
            assert everything(first) == everything(second) == list(range(80))
        else:
            assert len(set(everything(first))) == len(set(everything(second))) == 80
        assert first != second


def test_steps_per_epoch_counts_runs() -> None:
    _, model = made(3)
    trace, _ = fit(model, dataset().repeat(), epochs=2, steps_per_epoch=4)
    assert (trace.runs, trace.announced, len(trace.values)) == (4, 4, 8)
    assert len(examples_of(model)) == 24


@pytest.mark.parametrize("learners", [2, 3])
def test_of_data_of_unknown_length_a_rest_is_left_out(learners: int) -> None:
    _, model = made(learners)
    unknown = dataset().filter(lambda x, y: True)
    trace, _ = fit(model, unknown, epochs=2, may_end=True)
    runs = len(PARTS) // learners
    assert trace.runs == runs
    steps = examples_of(model)
    assert len(steps) == 2 * runs * learners
    for epoch in (steps[: runs * learners], steps[runs * learners :]):
        assert everything(epoch) == list(range(runs * learners * BATCH))


def test_a_generator_feeds_learners() -> None:
    _, model = made(2)

    def batches() -> Any:
        while True:
            yield from PARTS

    trace, _ = fit(model, batches(), epochs=2, steps_per_epoch=3)
    assert trace.runs == 3
    steps = examples_of(model)
    assert len(steps) == 12 and all(len(set(s)) == BATCH for s in steps)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_py_dataset_feeds_learners(workers: int) -> None:
    class Parts(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(PARTS)

        def __getitem__(self, index: int) -> Batch:
            return PARTS[index]

    _, model = made(2)
    trace, _ = fit(model, Parts(workers=workers), epochs=2, shuffle=False)
    # TensorFlow sees no end of it before it is there, so the rest of 11 batches is left out.
    assert trace.announced == trace.runs == 5
    steps = examples_of(model)
    assert everything(steps[:10]) == everything(steps[10:]) == list(range(80))


def test_train_on_batch_gives_each_learner_a_piece() -> None:
    _, model = made(2)
    model.train_on_batch(X[:16], Y[:16])
    assert sorted(examples_of(model)) == [tuple(range(8)), tuple(range(8, 16))]


def test_ragged_batches_go_to_one_learner_each() -> None:
    strategy = ModelAveragingStrategy(2)
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    runs: list[int] = []
    # Windows of other sizes cannot be put one behind the other.
    parts = tf.data.Dataset.from_generator(
        lambda: ((X[:n], Y[:n]) for n in (3, 5, 4, 6)),
        output_signature=(tf.TensorSpec((None, 6)), tf.TensorSpec((None, 1))),
    ).apply(tf.data.experimental.assert_cardinality(4))
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: runs.append(b))
    fit(model, parts, epochs=2, callbacks=[count])
    assert runs == [0, 1, 0, 1]


# What becomes of them.


def follows(
    model: keras.Model, weights: list[np.ndarray], runs: list[list[Batch]], **rule: Any
) -> None:
    reference = Reference(lambda: dense(sgd), weights, len(runs[0]), **rule)
    for batches in runs:
        reference.step(batches)
    for value, expected in zip(model.get_weights(), reference.central(), strict=True):
        close(value, expected)


@pytest.mark.parametrize("weighting", ["sample_weight", "class_weight"])
def test_weights_of_examples_reach_learners(weighting: str) -> None:
    _, model = made(2)
    before = model.get_weights()
    weight = np.linspace(0, 2, len(X), dtype="float32")
    labels = (np.arange(len(X)) % 2).astype("float32")[:, None]
    given: dict[str, Any] = {"sample_weight": weight}
    if weighting == "class_weight":
        given = {"class_weight": {0: 0.5, 1: 3.0}}
        weight = np.where(labels[:, 0] > 0, 3.0, 0.5).astype("float32")
    fit(model, X, labels, batch_size=BATCH, shuffle=False, **given)
    cuts = [slice(i, i + BATCH) for i in range(0, len(X), BATCH)]
    parts = [(X[c], labels[c], weight[c]) for c in cuts]
    follows(model, before, dealt(parts, 1, 2, 6))


def test_metrics_of_a_fit_are_over_all_learners() -> None:
    strategy, model = made(3, metrics=["mae"])
    model.optimizer.learning_rate = 0.0
    _, history = fit(model, X[:72], Y[:72], batch_size=BATCH)
    plain = dense(sgd, metrics=["mae"])
    expected = plain.evaluate(X[:72], Y[:72], verbose=0, return_dict=True)
    for name, value in expected.items():
        close(history.history[name], value, 1e-5)


def test_learners_draw_other_numbers_and_begin_alike() -> None:
    class Drawn(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.generator = keras.random.SeedGenerator(3)
            self.drawn: list[float] = []

        def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
            number = keras.random.uniform((), seed=self.generator)
            if not training or not tf.is_symbolic_tensor(inputs):
                return inputs

            def note(value: np.ndarray) -> np.float32:
                self.drawn.append(float(value))
                return np.float32(0)

            return inputs + tf.reshape(tf.numpy_function(note, [number], tf.float32), ())

    def drawn(learners: int) -> list[float]:
        strategy = ModelAveragingStrategy(learners)
        with strategy.scope():
            layer = Drawn()
            model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(1)])
            model.compile("sgd", "mse")
        fit(model, X, Y, batch_size=BATCH)
        return layer.drawn

    found = drawn(3)
    assert len(found) == len(set(found)) == 12
    # The first learner draws what one learner alone would.
    assert set(drawn(1)[:4]) <= set(found)


@pytest.mark.parametrize("learners", [1, 2])
def test_models_with_several_inputs_given_by_name(learners: int) -> None:
    strategy = ModelAveragingStrategy(learners)

    def build() -> keras.Model:
        keras.utils.set_random_seed(0)
        a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
        both = keras.layers.Concatenate()([a, b])
        outputs = {
            "sum": keras.layers.Dense(1, name="sum")(both),
            "two": keras.layers.Dense(2, name="two")(both),
        }
        model = keras.Model({"a": a, "b": b}, outputs)
        model.compile(sgd(), {"sum": "mse", "two": "mae"}, metrics={"two": ["mse"]})
        return model

    with strategy.scope():
        model = build()
    before = model.get_weights()
    x = {"a": X[:, :3], "b": X[:, 3:]}
    y = {"sum": Y, "two": X[:, :2]}
    fit(model, x, y, batch_size=BATCH, shuffle=False)
    parts = [
        tuple({k: v[i : i + BATCH] for k, v in d.items()} for d in (x, y))
        for i in range(0, len(X), BATCH)
    ]
    reference = Reference(build, before, learners)
    for batches in dealt(parts, 1, learners, -(-len(parts) // learners)):
        reference.step(batches)
    for value, expected in zip(model.get_weights(), reference.central(), strict=True):
        close(value, expected)


def plain_model(**compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(sgd(), "mse", **compiled)
    return model


@pytest.mark.parametrize("jit_compile", [False, True])
def test_steps_may_be_compiled(jit_compile: bool) -> None:
    strategy = ModelAveragingStrategy(2)
    with strategy.scope():
        model = plain_model(jit_compile=jit_compile)
    before = model.get_weights()
    fit(model, X, Y, batch_size=BATCH, shuffle=False)
    follows(model, before, dealt(PARTS, 1, 2, 6))


def test_models_are_trained_one_after_the_other_and_in_turn() -> None:
    strategy = ModelAveragingStrategy(2)
    with strategy.scope():
        models = [dense(sgd, seed) for seed in (3, 4)]
    before = [m.get_weights() for m in models]
    for _ in range(2):
        for model in models:
            fit(model, X, Y, batch_size=BATCH, shuffle=False)
    # Another fit begins with the data anew, and goes on with learners where they were.
    runs = 2 * dealt(PARTS, 1, 2, 6)
    for model, weights in zip(models, before, strict=True):
        follows(model, weights, runs)


def test_a_model_that_is_compiled_anew_goes_on_from_the_central_model() -> None:
    strategy, model = made(2)
    fit(model, X, Y, batch_size=BATCH, shuffle=False)
    with strategy.scope():
        model.compile(keras.optimizers.Adam(0.01), "mse")
    before = model.get_weights()
    trace, _ = fit(model, X, Y, batch_size=BATCH, shuffle=False)
    assert int(model.optimizer.iterations.numpy()) == trace.runs == 6
    assert 0 < max(strategy.distances()) < 1
    # The first steps of Adam are as large as its learning rate.
    assert np.max(np.abs(trace.values[1][0] - trace.values[0][0])) < 0.1
    assert np.max(np.abs(before[0] - trace.values[-1][0])) > 0.01


def test_two_optimizers_in_a_step_train_what_is_theirs() -> None:
    strategy = ModelAveragingStrategy(2, central_momentum=0.0)
    with strategy.scope():
        model = plain_model()
        first, second = keras.optimizers.SGD(0.02, momentum=0.9), keras.optimizers.SGD(0.05)
        first.build(model.layers[0].trainable_variables)
        second.build(model.layers[1].trainable_variables)
    before = model.get_weights()

    def step(batch: Any) -> tf.Tensor:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        parts = (model.layers[0].trainable_variables, model.layers[1].trainable_variables)
        first.apply_gradients(zip(gradients[:2], parts[0], strict=True))
        second.apply_gradients(zip(gradients[2:], parts[1], strict=True))
        return loss

    run = tf.function(lambda batch: strategy.run(step, args=(batch,)))
    shares = strategy.experimental_distribute_dataset(dataset())
    losses = [strategy.reduce("MEAN", run(batch), axis=None) for batch in shares]
    assert len(losses) == 6

    learners, central = [list(map(np.copy, before)) for _ in range(2)], before
    slots = [[np.zeros_like(w) for w in before[:2]] for _ in range(2)]
    other = plain_model()
    for batches in dealt(PARTS, 1, 2, 6):
        kept, moves = [], [np.zeros_like(w) for w in central]
        for weights, slot, (x, y) in zip(learners, slots, batches, strict=True):
            other.set_weights(weights)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(other(x) - y))
            gradients = [g.numpy() for g in tape.gradient(loss, other.trainable_variables)]
            for i in (0, 1):
                slot[i] = 0.9 * slot[i] - 0.02 * gradients[i]
            steps = [*slot, *(-0.05 * g for g in gradients[2:])]
            given = [0.5 * (w - z) for w, z in zip(weights, central, strict=True)]
            moves = [m + g for m, g in zip(moves, given, strict=True)]
            kept.append([w + s - g for w, s, g in zip(weights, steps, given, strict=True)])
        learners, central = kept, [z + m for z, m in zip(central, moves, strict=True)]
    for value, expected in zip(model.get_weights(), central, strict=True):
        close(value, expected)


# Custom loops.


def loop_step(model: keras.Model) -> Callable:
    def step(batch: Any) -> tf.Tensor:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return step


@pytest.mark.parametrize("kind", ["graph", "eager", "tf.function", "loop in a graph"])
def test_custom_loops_follow_the_rule(kind: str) -> None:
    strategy, model = made(2)
    before = model.get_weights()
    step = loop_step(model)
    if kind == "tf.function":
        step = tf.function(step)

    def run(batch: Any) -> tf.Tensor:
        return strategy.reduce("MEAN", strategy.run(step, args=(batch,)), axis=None)

    shares = strategy.experimental_distribute_dataset(dataset())
    if kind == "loop in a graph":

        @tf.function
        def epoch() -> tf.Tensor:
            total, count = 0.0, 0.0
            for batch in shares:
                total += run(batch)
                count += 1.0
            return total / count

        assert np.isfinite(float(epoch()))
    else:
        call = run if kind == "eager" else tf.function(run)
        losses = [float(call(batch)) for batch in shares]
        assert len(losses) == 6 and losses[-1] < losses[0]
    follows(model, before, dealt(PARTS, 1, 2, 6))
    assert strategy.local_report().rounds == 6


def test_datasets_from_a_function_are_read_a_batch_for_each_learner() -> None:
    strategy, model = made(2)
    before = model.get_weights()
    contexts: list[tf.distribute.InputContext] = []

    def make(context: tf.distribute.InputContext) -> tf.data.Dataset:
        contexts.append(context)
        return dataset()

    run = tf.function(lambda batch: strategy.run(loop_step(model), args=(batch,)))
    count = 0
    for batch in strategy.distribute_datasets_from_function(make):
        assert len(strategy.experimental_local_results(run(batch))) == 2
        count += 1
    (context,) = contexts
    assert (context.num_input_pipelines, context.num_replicas_in_sync) == (1, 1)
    assert count == 5
    follows(model, before, dealt(PARTS, 1, 2, 5))


@pytest.mark.parametrize("learners", [2, 3])
def test_equal_seeds_give_equal_bits(learners: int) -> None:
    found = []
    for _ in range(5):
        keras.utils.set_random_seed(5)
        _, model = made(learners)
        model.fit(dataset(), epochs=3, verbose=0)
        found.append(b"".join(w.tobytes() for w in model.get_weights()))
    assert len(set(found)) == 1


def test_fit_takes_datasets_that_are_distributed_already() -> None:
    found = []
    for is_distributed in (False, True):
        keras.utils.set_random_seed(4)
        strategy, model = made(2)
        data: Any = dataset(8 * BATCH)
        if is_distributed:
            data = strategy.experimental_distribute_dataset(data)
            assert int(data.cardinality()) == 4
        history = model.fit(data, epochs=2, verbose=0).history
        found.append((model.get_weights(), history))
    (weights, history), (as_well, again) = found
    assert history == again
    for one, other in zip(weights, as_well, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_trains_nothing_is_no_run() -> None:
    strategy, model = made(2)
    before = strategy.local_report().rounds
    shares = strategy.experimental_distribute_dataset(dataset())
    total = 0.0
    for batch in shares:
        parts = strategy.run(tf.function(lambda b: tf.reduce_sum(model(b[0]))), args=(batch,))
        total += float(strategy.reduce("SUM", parts, axis=None))
    # 6 runs of two batches each; the last of them has the first batch again.
    expected = float(tf.reduce_sum(model(X))) + float(tf.reduce_sum(model(X[:BATCH])))
    assert total == pytest.approx(expected, rel=1e-4)
    assert strategy.local_report().rounds == before


def test_values_of_the_wrong_number_of_learners_are_refused() -> None:
    strategy, model = made(2)
    other = ModelAveragingStrategy(3)
    batch = next(iter(other.experimental_distribute_dataset(dataset())))
    with pytest.raises(ValueError, match="Received: 3 parts for 2 learners"):
        strategy.run(loop_step(model), args=(batch,))


def test_the_progress_bar_counts_runs(capsys: pytest.CaptureFixture[str]) -> None:
    _, model = made(3)
    trace = Trace()
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=2, callbacks=[trace])
    printed = capsys.readouterr().out
    assert printed.count("4/4") == 2 and "11/11" not in printed
