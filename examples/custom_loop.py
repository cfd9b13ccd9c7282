"""Trains on the digits with a training loop of its own instead of model.fit.

python examples/custom_loop.py
"""

import json
import os
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import app, flags
from mnist_data import NUM_CLASSES, load_digits

import tf_syncdist

FLAGS = flags.FLAGS

flags.DEFINE_integer("epochs", 12, "How many epochs to train.", lower_bound=1)
flags.DEFINE_integer("batch_size", 48, "Examples in one update of all workers.", lower_bound=1)
flags.DEFINE_integer("backup_workers", 0, "Workers no update waits for.", lower_bound=0)
flags.DEFINE_float("learning_rate", 0.004, "Learning rate of Adam.")
flags.DEFINE_string("summary_dir", None, "Directory in which worker I writes worker-I.json.")

SEED = 1  # Every worker must start from the same weights and see the data in the same order.


def write_summary(
    strategy: tf_syncdist.SyncReplicasStrategy,
    weights_sha256: str,
    optimizer_sha256: str,
    metrics: dict[str, float],
) -> None:
    """Writes what this worker did and ended with as worker-I.json, in one move."""
    report = strategy.local_report()
    counts = ("worker", "num_workers", "rounds", "contributed", "late", "replayed", "wall_seconds")
    summary: dict[str, Any] = {name: getattr(report, name) for name in counts}
    summary |= {"weights_sha256": weights_sha256, "optimizer_sha256": optimizer_sha256}
    path = Path(FLAGS.summary_dir) / f"worker-{report.worker}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({**summary, "metrics": metrics}, indent=2) + "\n")
    os.replace(unfinished, path)


def main(_: list[str]) -> None:
    """Trains, tests and reports."""
    # A `ps` task does its work inside this call and ends there; only workers come back from it.
    strategy = tf_syncdist.SyncReplicasStrategy(backup_workers=FLAGS.backup_workers)
    keras.utils.set_random_seed(SEED)
    data = load_digits()
    batches = tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train))
    batches = batches.shuffle(len(data.x_train), seed=SEED)
    batches = batches.batch(FLAGS.batch_size, drop_remainder=True)
    batches = strategy.experimental_distribute_dataset(batches)

    with strategy.scope():
        model = keras.Sequential([
            keras.Input(data.x_train.shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(NUM_CLASSES),
        ])  # fmt: skip
        optimizer = keras.optimizers.Adam(FLAGS.learning_rate)
        optimizer.build(model.trainable_variables)
        loss_of_examples = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="none"
        )
        # Metrics are summed over all workers when they are read.
        train_loss = keras.metrics.Mean()
        train_accuracy = keras.metrics.SparseCategoricalAccuracy()

    def replica_step(images: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            # The replicas' gradients are summed, so the loss is their part of the batch's mean.
            loss = tf.nn.compute_average_loss(
                loss_of_examples(labels, logits), global_batch_size=FLAGS.batch_size
            )
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        train_loss.update_state(loss * strategy.num_replicas_in_sync)
        train_accuracy.update_state(labels, logits)

    @tf.function
    def train_step(images: tf.Tensor, labels: tf.Tensor) -> None:
        strategy.run(replica_step, args=(images, labels))

    metrics: dict[str, float] = {}
    for epoch in range(FLAGS.epochs):
        train_loss.reset_state()
        train_accuracy.reset_state()
        for images, labels in batches:
            train_step(images, labels)
        logits = model(data.x_test, training=False)
        tested = keras.metrics.sparse_categorical_accuracy(data.y_test, logits)
        metrics = {
            "loss": float(train_loss.result()),
            "accuracy": float(train_accuracy.result()),
            "test_loss": float(tf.reduce_mean(loss_of_examples(data.y_test, logits))),
            "test_accuracy": float(tf.reduce_mean(tested)),
        }
        if strategy.is_chief:
            values = "  ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
            print(f"epoch {epoch + 1}/{FLAGS.epochs}  {values}", flush=True)

    weights_sha256 = tf_syncdist.variables_sha256(model.trainable_variables)
    if FLAGS.summary_dir:
        optimizer_sha256 = tf_syncdist.variables_sha256(optimizer.variables)
        write_summary(strategy, weights_sha256, optimizer_sha256, metrics)
    if strategy.is_chief:
        print(f"test accuracy: {metrics['test_accuracy']:.4f}", flush=True)
    print(f"worker {strategy.worker_index}: weights_sha256={weights_sha256}", flush=True)


if __name__ == "__main__":
    app.run(main)
