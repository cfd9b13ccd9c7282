"""Trains a small classifier of handwritten digits with model.fit on any number of workers.

    python examples/train_mnist.py
    python -m tf_syncdist.launch --num_workers=3 examples/train_mnist.py --backup_workers=1

Everything that makes it distributed is the strategy and its scope; the rest is ordinary Keras.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from mnist_data import NUM_CLASSES, Dataset, load_digits, load_mnist

import tf_syncdist

FLAGS = flags.FLAGS

flags.DEFINE_enum(
    "dataset",
    None,
    ["digits", "mnist"],
    "What to learn; by default mnist with --data_dir, or digits.",
)
flags.DEFINE_string("data_dir", None, "Directory of MNIST's IDX files; downloads without it.")
flags.DEFINE_enum("model", "mlp", ["mlp", "cnn"], "Which network to train.")
flags.DEFINE_float("learning_rate", None, "Learning rate; by default one that suits --optimizer.")
flags.DEFINE_integer(
    "batch_size",
    None,
    "Examples in one update, over all workers together; 48 by default. With a --strategy that "
    "mixes models, those in each worker's own update; 16 by default, for such strategies are made "
    "for small batches.",
    lower_bound=1,
)
flags.DEFINE_integer("epochs", 12, "How many epochs to train.", lower_bound=1)
flags.DEFINE_integer(
    "steps_per_epoch", None, "Updates in an epoch; by default as many as the data.", lower_bound=1
)
flags.DEFINE_integer(
    "backup_workers", 0, "How many workers' gradients no update waits for.", lower_bound=0
)
flags.DEFINE_enum(
    "strategy",
    "sync_replicas",
    ["sync_replicas", "model_averaging", "elastic_averaging", "gossip", "async"],
    "How workers train together: with the first they average gradients, with the others they mix "
    "models, and a batch is that of a worker, not of all.",
)
flags.DEFINE_string(
    "learners_per_device",
    None,
    "With --strategy=model_averaging: how many learners each device has, 1 by default; auto lets "
    "fit find out.",
)
flags.DEFINE_string(
    "slow_worker",
    None,
    "INDEX:SECONDS[:PROBABILITY] delays the training steps of that worker, like a slow machine.",
)
flags.DEFINE_string(
    "slow_input",
    None,
    "INDEX:SECONDS[:PROBABILITY] delays the reading of training batches on that worker.",
)
flags.DEFINE_integer(
    "seed", 1, "Seed of the weights, the order of the data and the delays.", lower_bound=0
)
flags.DEFINE_string(
    "record_trace", None, "File in which it is recorded how long each worker takes for each round."
)
flags.DEFINE_string("summary_dir", None, "Directory in which worker I writes worker-I.json.")

# Each optimizer with a learning rate that suits the models below.
OPTIMIZERS: dict[str, tuple[type[keras.optimizers.Optimizer], dict[str, Any]]] = {
    "adam": (keras.optimizers.Adam, {"learning_rate": 0.004}),
    "adamw": (keras.optimizers.AdamW, {"learning_rate": 0.004}),
    "adagrad": (keras.optimizers.Adagrad, {"learning_rate": 0.05}),
    "nadam": (keras.optimizers.Nadam, {"learning_rate": 0.004}),
    "rmsprop": (keras.optimizers.RMSprop, {"learning_rate": 0.001}),
    "sgd": (keras.optimizers.SGD, {"learning_rate": 0.05, "momentum": 0.9}),
}
flags.DEFINE_enum("optimizer", "adam", sorted(OPTIMIZERS), "Optimizer; sgd has momentum.")


class Slowness(NamedTuple):
    """Which worker is slow, by how many seconds a step or batch, and in what share of them."""

    index: int
    seconds: float
    probability: float


def parse_slowness(flag: str, text: str | None) -> Slowness | None:
    """Parses INDEX:SECONDS[:PROBABILITY], or returns None when there is nothing to parse."""
    if text is None:
        return None
    parts = text.split(":")
    try:
        index, seconds, probability = parts if len(parts) == 3 else [*parts, "1"]
        slow = Slowness(int(index), float(seconds), float(probability))
    except ValueError:
        slow = None
    valid = slow and slow.index >= 0 and 0 <= slow.seconds < np.inf and 0 <= slow.probability <= 1
    if not valid:
        raise ValueError(
            f"--{flag}: expected INDEX:SECONDS[:PROBABILITY] with a worker's index from 0, "
            f"seconds from 0 and a probability from 0 to 1. Received: {text!r}. "
            f"Write for example --{flag}=2:0.5 or --{flag}=2:0.5:0.1."
        )
    return slow


def parse_learners(text: str) -> int | str:
    """Returns the number of learners that --learners_per_device gives, or "auto"."""
    if text == "auto":
        return text
    if not text.isdecimal() or not int(text):
        raise ValueError(
            "--learners_per_device: expected a number from 1, or auto. Received: "
            f"{text!r}. Write for example --learners_per_device=2."
        )
    return int(text)


class Sleeper:
    """Sleeps now and then, each worker in its own pattern."""

    def __init__(self, slow: Slowness, worker_index: int, seed: int) -> None:
        self.acts = worker_index == slow.index
        self._slow = slow
        self._random = np.random.default_rng([seed, worker_index])

    def _sleep(self) -> np.float32:
        if self._random.random() < self._slow.probability:
            time.sleep(self._slow.seconds)
        return np.float32(0)

    def delay(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns the tensor after the sleep; all that is computed from it waits."""
        with tf.control_dependencies([tf.numpy_function(self._sleep, [], tf.float32)]):
            return tf.identity(tensor)


class Delay(keras.layers.Layer):
    """Passes its input through, and sleeps first in the training steps of the slow worker.

    Every worker has the layer, so that all of them build the same model, but it acts in one. The
    sleep is part of the computation: a worker that does not compute a round does not sleep in it.
    """

    def __init__(self, sleeper: Sleeper) -> None:
        super().__init__(name="delay")
        self.supports_jit = False  # XLA cannot compile the call into Python.
        self._sleeper = sleeper

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the inputs, after the sleep if there is one."""
        return self._sleeper.delay(inputs) if training and self._sleeper.acts else inputs


def make_strategy() -> Any:
    """Makes the strategy that --strategy names."""
    if FLAGS.strategy == "sync_replicas":
        return tf_syncdist.SyncReplicasStrategy(
            backup_workers=FLAGS.backup_workers, record_trace=FLAGS.record_trace
        )
    if FLAGS.backup_workers:
        raise ValueError(
            "--backup_workers: expected 0, since only sync_replicas makes an update of several "
            f"workers' gradients. Received: {FLAGS.backup_workers} with "
            f"--strategy={FLAGS.strategy}. Leave one of the two out."
        )
    if FLAGS.strategy == "model_averaging":
        return tf_syncdist.ModelAveragingStrategy(parse_learners(FLAGS.learners_per_device or "1"))
    if FLAGS.learners_per_device:
        raise ValueError(
            "--learners_per_device: expected none but with --strategy=model_averaging. Received: "
            f"{FLAGS.learners_per_device} with --strategy={FLAGS.strategy}. Leave it out."
        )
    return {
        "elastic_averaging": tf_syncdist.ElasticAveragingStrategy,
        "gossip": tf_syncdist.GossipStrategy,
        "async": tf_syncdist.AsyncStrategy,
    }[FLAGS.strategy]()


def make_sleeper(flag: str, slow: Slowness | None, strategy: Any) -> Sleeper | None:
    """Returns what makes a worker of this job slow, or None when nothing does."""
    if slow is None:
        return None
    if slow.index >= strategy.num_workers:
        raise ValueError(
            f"--{flag}: expected a worker from 0 to {strategy.num_workers - 1}. Received: "
            f"{slow.index}. Name a worker of this job."
        )
    return Sleeper(slow, strategy.worker_index, FLAGS.seed)


def build_model(image_shape: tuple[int, ...], delay: Delay | None) -> keras.Model:
    """Builds the network that --model names, which returns logits."""
    layers: list[keras.layers.Layer] = [keras.Input(image_shape)]
    if delay is not None:
        layers.append(delay)
    if FLAGS.model == "cnn":
        layers.append(keras.layers.Reshape((*image_shape, 1)))
        for filters in (16, 32):
            layers.append(keras.layers.Conv2D(filters, 3, padding="same", activation="relu"))
            layers.append(keras.layers.MaxPooling2D())
        layers.append(keras.layers.Flatten())
    else:
        layers.append(keras.layers.Flatten())
        layers.append(keras.layers.Dense(128, activation="relu"))
    layers.append(keras.layers.Dense(NUM_CLASSES))
    return keras.Sequential(layers)


def build_optimizer() -> keras.optimizers.Optimizer:
    """Builds the optimizer that --optimizer and --learning_rate ask for."""
    optimizer_class, options = OPTIMIZERS[FLAGS.optimizer]
    if FLAGS.learning_rate is not None:
        options = {**options, "learning_rate": FLAGS.learning_rate}
    return optimizer_class(**options)


def load_data() -> Dataset:
    """Loads what --dataset and --data_dir ask for."""
    if FLAGS.data_dir and FLAGS.dataset == "digits":
        raise ValueError(
            "--data_dir: expected none with --dataset=digits, since these digits come with "
            f"scikit-learn. Received: {FLAGS.data_dir!r}. Leave one of the two out."
        )
    if FLAGS.data_dir or FLAGS.dataset == "mnist":
        return load_mnist(FLAGS.data_dir)
    return load_digits()


def batch_size() -> int:
    """Returns --batch_size, or what suits --strategy."""
    return FLAGS.batch_size or (48 if FLAGS.strategy == "sync_replicas" else 16)


def training_batches(data: Dataset, sleeper: Sleeper | None) -> tf.data.Dataset:
    """Returns the batches of all workers together, of which the strategy gives each its part.

    Every worker must see the same batches in the same order, hence the seed.
    """
    if batch_size() > len(data.x_train):
        raise ValueError(
            f"--batch_size: expected at most the {len(data.x_train)} training examples of this "
            f"data. Received: {batch_size()}. Use a smaller batch."
        )
    dataset = tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train))
    dataset = dataset.shuffle(len(data.x_train), seed=FLAGS.seed)
    dataset = dataset.batch(batch_size(), drop_remainder=True)
    if sleeper and sleeper.acts:
        dataset = dataset.map(lambda x, y: (sleeper.delay(x), y))
    # With a number of steps of its own, an epoch may end anywhere in the data.
    return dataset.repeat() if FLAGS.steps_per_epoch else dataset


def summarize(strategy: Any, model: keras.Model, metrics: dict[str, float]) -> dict[str, Any]:
    """Collects what this worker did and what it ended with."""
    report = strategy.local_report()
    optimizer_state = [v for v in model.optimizer.variables if "gradient_accumulator" not in v.path]
    return {
        "worker": report.worker,
        "num_workers": report.num_workers,
        "rounds": report.rounds,
        "contributed": report.contributed,
        "late": report.late,
        "replayed": report.replayed,
        "wall_seconds": report.wall_seconds,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(optimizer_state),
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def write_summary(directory: str, summary: dict[str, Any]) -> None:
    """Writes worker-I.json in one move, so that nobody reads half of it."""
    path = Path(directory) / f"worker-{summary['worker']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(unfinished, path)


def main(argv: list[str]) -> None:
    """Trains, tests and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags. Received: {argv[1:]}. Write --name=value.")
    slow = {flag: parse_slowness(flag, FLAGS[flag].value) for flag in ("slow_worker", "slow_input")}
    # A `ps` task does its work inside this call and ends there; only workers come back from it.
    strategy = make_strategy()
    slow_worker = make_sleeper("slow_worker", slow["slow_worker"], strategy)
    slow_input = make_sleeper("slow_input", slow["slow_input"], strategy)
    keras.utils.set_random_seed(FLAGS.seed)
    data = load_data()

    with strategy.scope():
        delay = Delay(slow_worker) if slow_worker else None
        model = build_model(data.x_train.shape[1:], delay)
        model.compile(
            optimizer=build_optimizer(),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    history = model.fit(
        training_batches(data, slow_input),
        shuffle=False,  # The dataset does that.
        epochs=FLAGS.epochs,
        steps_per_epoch=FLAGS.steps_per_epoch,
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=batch_size(),
    )
    tested = model.evaluate(
        data.x_test, data.y_test, batch_size=batch_size(), verbose=0, return_dict=True
    )
    metrics = {name: values[-1] for name, values in history.history.items()}
    metrics |= {f"test_{name}": value for name, value in tested.items()}

    summary = summarize(strategy, model, metrics)
    if FLAGS.summary_dir:
        write_summary(FLAGS.summary_dir, summary)
    if strategy.is_chief:
        print(f"test accuracy: {metrics['test_accuracy']:.4f}", flush=True)
    print(f"worker {summary['worker']}: weights_sha256={summary['weights_sha256']}", flush=True)


if __name__ == "__main__":
    app.run(main)
