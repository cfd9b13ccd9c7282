"""Trains several models one after the other, eagerly, with the same lines of a program."""

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist


def train(strategy: tf_syncdist.SyncReplicasStrategy, fold: int) -> dict[str, object]:
    """Trains a new model from weights of this worker's own."""
    keras.utils.set_random_seed(100 * fold + strategy.worker_index)
    x = np.random.RandomState(fold).randn(40, 4).astype("float32")
    y = x[:, :1]
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        optimizer = keras.optimizers.Adam(0.05)
        loss_of_all = keras.metrics.Mean()

    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2) / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        loss_of_all.update_state(loss)

    for batch in strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    ):
        strategy.run(step, args=batch)
    return {
        "loss": float(loss_of_all.result()),
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        "optimizer_sha256": tf_syncdist.variables_sha256(optimizer.variables),
    }


def main() -> None:
    strategy = tf_syncdist.SyncReplicasStrategy(**task.patience())
    results = {f"fold {fold}": train(strategy, fold) for fold in range(3)}
    task.write(strategy.worker_index, {**results, "local": strategy.local_report()._asdict()})


main()
