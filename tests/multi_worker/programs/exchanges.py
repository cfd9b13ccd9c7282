"""Trains with several exchanges in a run, and with more than a Keras optimizer's update in it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 16
STEPS = 6
RATE = 0.05

PLAIN = task.ARGUMENTS["plain"]
strategy = tf.distribute.get_strategy()
if not PLAIN:
    strategy = tf_syncdist.SyncReplicasStrategy(
        backup_workers=task.ARGUMENTS.get("backup_workers", 0),
        **task.patience(task.ARGUMENTS.get("backup_workers", 0)),
    )
worker = 0 if PLAIN else strategy.worker_index
is_slow = worker == 1 and task.ARGUMENTS.get("slow", False)


def fall_behind() -> None:
    """Waits until this worker's round and the next one are over, however busy the machine is."""
    done = strategy.local_report().rounds
    # Where a case's variables are made in its first run, the second one waits for all workers; and
    # a case begins when all have done the one before.
    step = done % STEPS
    over = done + (2 if 0 < step < STEPS - 1 else 1)
    deadline = time.monotonic() + 100
    while strategy.report().rounds < over:
        if time.monotonic() > deadline:
            raise TimeoutError(f"run {done}: the other worker has not done {over} within 100 s")
        time.sleep(0.01)


def dense(inputs: int, outputs: int) -> keras.Model:
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(outputs)]
    return keras.Sequential([keras.Input((inputs,)), *layers])


def sgd(*models: keras.Model) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    optimizer.build([v for m in models for v in m.trainable_variables])
    return optimizer


def mean(values: tf.Tensor) -> tf.Tensor:
    """Returns this replica's part of the mean over the batch of an update."""
    return tf.reduce_sum(values) / BATCH_SIZE


def minimise(optimizer: keras.optimizers.Optimizer, model: keras.Model, loss: Callable) -> None:
    with tf.GradientTape() as tape:
        value = loss()
    variables = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))


class Case(keras.Model):
    """A model that trains by its own `step`, in fit or in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.built = True
        self.loose: list[tf.Variable] = []
        self.probes = 0

    def step(self, x: tf.Tensor) -> None:
        raise NotImplementedError

    def replica_step(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        if self.probes:
            self.probes -= 1
        elif is_slow:
            x = task.after(x, fall_behind)
        self.step(x)
        return {"examples": tf.shape(x)[0]}

    def train_step(self, data: tf.Tensor) -> dict[str, tf.Tensor]:
        return self.replica_step(data)

    def loose_variable(self, value: Any, name: str) -> tf.Variable:
        variable = tf.Variable(
            value, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
        )
        self.loose.append(variable)
        return variable

    def everything(self) -> list[Any]:
        optimizers = [v for v in vars(self).values() if isinstance(v, keras.optimizers.Optimizer)]
        optimizers = [o for o in optimizers if o is not getattr(self, "optimizer", None)]
        return [*self.variables, *self.loose, *(v for o in optimizers for v in o.variables)]


class Gan(Case):
    """Two networks with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = dense(2, 4), dense(4, 1)
        self.generator_optimizer, self.critic_optimizer = sgd(self.generator), sgd(self.critic)

    def train_critic(self, x: tf.Tensor) -> None:
        made = self.generator(x[:, :2], training=True)
        minimise(
            self.critic_optimizer,
            self.critic,
            lambda: mean(tf.math.softplus(-self.critic(x)) + tf.math.softplus(self.critic(made))),
        )

    def train_generator(self, x: tf.Tensor) -> None:
        minimise(
            self.generator_optimizer,
            self.generator,
            lambda: mean(tf.math.softplus(-self.critic(self.generator(x[:, :2], training=True)))),
        )

    def step(self, x: tf.Tensor) -> None:
        self.train_critic(x)
        self.train_generator(x)


class ManyCritics(Gan):
    """The critic is trained three times in each step."""

    def step(self, x: tf.Tensor) -> None:
        for _ in range(3):
            self.train_critic(x)
        self.train_generator(x)


class ManyCriticsInWhile(Gan):
    """The same in a loop of the graph."""

    def step(self, x: tf.Tensor) -> None:
        def body(i: tf.Tensor) -> tuple:
            self.train_critic(x)
            return (i + 1,)

        tf.while_loop(lambda i: i < 3, body, [0])
        self.train_generator(x)


class ManyCriticsInAutoGraph(Gan):
    """The same in a loop that AutoGraph makes."""

    def step(self, x: tf.Tensor) -> None:
        for _ in tf.range(3):
            self.train_critic(x)
        self.train_generator(x)


class Clipped(Gan):
    """The critic's weights are clipped by hand."""

    def step(self, x: tf.Tensor) -> None:
        super().step(x)
        for w in self.critic.trainable_variables:
            w.assign(tf.clip_by_value(w, -0.2, 0.2))


class EveryThird(Gan):
    """The generator is trained in every third run only."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = self.loose_variable(0, "runs")

    def step(self, x: tf.Tensor) -> None:
        self.train_critic(x)

        def train() -> tf.Tensor:
            self.train_generator(x)
            return tf.constant(0)

        tf.cond(tf.equal(self.runs % 3, 0), train, lambda: tf.constant(0))
        self.runs.assign_add(1)


class Student(Case):
    """One network that learns to add up."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.make_net()
        self.net_optimizer = sgd(self.net)

    def make_net(self) -> keras.Model:
        return dense(4, 1)

    def error(self, x: tf.Tensor, net: keras.Model | None = None) -> tf.Tensor:
        outputs = (net or self.net)(x, training=True)
        return mean((outputs - tf.reduce_sum(x, -1, keepdims=True)) ** 2)

    def step(self, x: tf.Tensor) -> None:
        minimise(self.net_optimizer, self.net, lambda: self.error(x))


def descend_by_hand(net: keras.Model, loss: Callable) -> None:
    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, net.trainable_variables)
    context = tf.distribute.get_replica_context()
    summed = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    for variable, gradient in zip(net.trainable_variables, summed, strict=True):
        variable.value.assign_sub(RATE * gradient)


class ByHand(Case):
    """No optimizer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense(4, 1)

    def step(self, x: tf.Tensor) -> None:
        descend_by_hand(
            self.net,
            lambda: mean((self.net(x) - tf.reduce_sum(x, -1, keepdims=True)) ** 2),
        )


class ByHandAndOptimizer(Student):
    """A second network is trained by hand, after the first one's optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.other = dense(4, 1)

    def step(self, x: tf.Tensor) -> None:
        super().step(x)
        descend_by_hand(self.other, lambda: self.error(x, self.other))


class FrozenTeacher(Student):
    """A teacher follows the student, who learns from it too."""

    trained = False

    def __init__(self) -> None:
        super().__init__()
        self.teacher = dense(4, 1)
        self.teacher.trainable = self.trained

    def step(self, x: tf.Tensor) -> None:
        taught = tf.stop_gradient(self.teacher(x))
        minimise(
            self.net_optimizer,
            self.net,
            lambda: self.error(x) + 0.1 * mean((self.net(x) - taught) ** 2),
        )
        for ours, theirs in zip(self.teacher.variables, self.net.variables, strict=True):
            ours.assign(0.8 * ours + 0.2 * theirs)


class Teacher(FrozenTeacher):
    """The same, with a teacher that is trainable by its own account."""

    trained = True


class Curriculum(keras.layers.Layer):
    """Shows more of its inputs from call to call."""

    def build(self, shape: tuple) -> None:
        self.calls = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="calls"
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if training:
            self.calls.assign(self.calls + 1)
        return inputs * tf.minimum(tf.cast(self.calls.value, tf.float32) / STEPS, 1.0)


class Counting(Student):
    """A layer counts, and computes with its count."""

    def make_net(self) -> keras.Model:
        return keras.Sequential([keras.Input((4,)), Curriculum(), keras.layers.Dense(1)])


class Spectral(Student):
    """A layer writes weights of its own while it computes."""

    def make_net(self) -> keras.Model:
        layer = keras.layers.SpectralNormalization(keras.layers.Dense(3), power_iterations=2)
        return keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])


class Nested(Student):
    """The update is in a tf.function that is traced once, whatever the length of a batch."""

    examples = BATCH_SIZE * STEPS - 6

    def __init__(self) -> None:
        super().__init__()
        self.inner = tf.function(
            super().step, input_signature=[tf.TensorSpec((None, 4), tf.float32)]
        )

    def step(self, x: tf.Tensor) -> None:
        self.inner(x)


class NestedByShape(Nested):
    """The same, traced for every length of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tf.function(super(Nested, self).step)


def in_function(case: Case, data: Any) -> None:
    @tf.function
    def step(x: tf.Tensor) -> Any:
        return strategy.run(case.replica_step, args=(x,))

    for x in data:
        step(x)


def around_function(case: Case, data: Any) -> None:
    step = tf.function(case.replica_step)
    for x in data:
        strategy.run(step, args=(x,))


def eagerly(case: Case, data: Any) -> None:
    # Without a graph, a function's first call goes as far as an exchange, is undone and begins
    # anew as a run. The other worker waits in front of that.
    case.probes = 0 if PLAIN else 1
    for x in data:
        strategy.run(case.replica_step, args=(x,))


def eagerly_anew(case: Case, data: Any) -> None:
    """A function that is another one in every step."""
    case.probes = 0 if PLAIN else 1
    for x in data:
        strategy.run(lambda x: case.replica_step(x), args=(x,))


LOOPS = {
    "in_function": in_function,
    "around_function": around_function,
    "eagerly": eagerly,
    "eagerly_anew": eagerly_anew,
}

CASES: dict[str, tuple[type[Case], tuple[str, ...]]] = {
    "gan": (Gan, ("fit", "in_function", "around_function", "eagerly")),
    "many_critics": (ManyCritics, ("fit", "around_function")),
    "many_critics_in_while": (ManyCriticsInWhile, ("fit", "around_function")),
    "many_critics_in_autograph": (ManyCriticsInAutoGraph, ("in_function",)),
    "clipped": (Clipped, ("fit", "eagerly")),
    "every_third": (EveryThird, ("fit", "in_function")),
    "by_hand": (ByHand, ("fit", "in_function", "eagerly")),
    "by_hand_and_optimizer": (ByHandAndOptimizer, ("around_function",)),
    "frozen_teacher": (FrozenTeacher, ("fit", "eagerly")),
    "teacher": (Teacher, ("fit", "in_function")),
    "counting": (Counting, ("fit", "around_function", "eagerly")),
    "spectral": (Spectral, ("fit", "in_function")),
    "nested": (Nested, ("fit", "in_function", "around_function", "eagerly", "eagerly_anew")),
    "nested_by_shape": (NestedByShape, ("in_function",)),
}


def every() -> Iterator[tuple[str, type[Case], str]]:
    for name, (make, forms) in CASES.items():
        for form in forms:
            if task.ARGUMENTS.get("only") in (None, name, f"{name}-{form}"):
                yield f"{name}-{form}", make, form


def main() -> None:
    results = {}
    for name, make, form in every():
        print(f"== {name}", flush=True)
        keras.utils.set_random_seed(1)  # Cases are compared with each other too.
        with contextlib.nullcontext() if PLAIN else strategy.scope():
            case = make()
            case.compile()
        examples = getattr(case, "examples", BATCH_SIZE * STEPS)
        x = np.random.RandomState(1).randn(examples, 4).astype("float32")
        data = tf.data.Dataset.from_tensor_slices(x).batch(BATCH_SIZE)
        before = None if PLAIN else strategy.local_report()
        if form == "fit":
            case.fit(data, verbose=0)
        else:
            LOOPS[form](case, data if PLAIN else strategy.experimental_distribute_dataset(data))
        variables = case.everything()
        results[name] = {
            "values": [np.asarray(v.numpy()).tolist() for v in variables],
            "everything_sha256": tf_syncdist.variables_sha256(variables),
        }
        if not PLAIN:
            after = strategy.local_report()
            for count in ("rounds", "contributed", "late", "replayed"):
                results[name][count] = getattr(after, count) - getattr(before, count)
    print("== end", flush=True)
    task.write(worker, results)


main()
