"""Executes another number of exchanges in a run on one worker than on the other."""

import keras
import task
import tensorflow as tf

import tf_syncdist

strategy = tf_syncdist.SyncReplicasStrategy(**task.PATIENCE)
# For the service that has gone with worker 0.
task.wait_less(strategy, 25.0)
twice = strategy.worker_index == task.ARGUMENTS["twice"]
with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)


def replica_step(inputs: tf.Tensor) -> None:
    for _ in range(2 if twice else 1):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(inputs))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


@tf.function
def step() -> None:
    strategy.run(replica_step, args=(tf.ones((8, 4)),))


error = ""
try:
    for _ in range(5):
        step()
except tf.errors.OpError as e:
    error = e.message
task.write(strategy.worker_index, {"error": error})
