"""Trains in a custom loop that goes on where the job is."""

import member
import numpy as np
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 12


def main() -> None:
    arguments = member.ARGUMENTS
    rounds = arguments["rounds"]
    strategy = tf_syncdist.SyncReplicasStrategy(
        arguments.get("backup_workers", 0),
        transport=arguments.get("transport", "auto"),
        **member.PATIENCE,
    )
    model, optimizer = member.model_and_optimizer(strategy)
    trace = member.Trace(optimizer, model.trainable_variables)

    def replica_step(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - x[:, :4]) ** 2)
            loss /= strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def step(x: tf.Tensor) -> tf.Tensor:
        return strategy.run(replica_step, (x,))

    resumed_at = strategy.resume_run
    for run in range(resumed_at, rounds):
        random = np.random.RandomState((strategy.worker_index << 20) + run)
        step(tf.constant(random.randn(BATCH_SIZE, 16).astype("float32")))
        trace.note()
    member.write(strategy, model, optimizer, resumed_at=resumed_at)


main()
