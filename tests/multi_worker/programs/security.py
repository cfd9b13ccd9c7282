"""Trains with `fit` in a job whose tasks have to show who they are."""

import keras
import numpy as np
import task

import tf_syncdist


def main() -> None:
    options = task.ARGUMENTS["options"]
    strategy = tf_syncdist.SyncReplicasStrategy(**options, **task.patience())
    keras.utils.set_random_seed(strategy.worker_index)
    x = np.random.RandomState(1).randn(320, 16).astype("float32")
    y = x[:, :4].argmax(1)
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    history = model.fit(x, y, batch_size=32, epochs=3, shuffle=False, verbose=0).history
    results = {
        "history": history,
        "weights_sha256": tf_syncdist.variables_sha256(model.trainable_variables),
        **task.counts(strategy),
    }
    task.write(strategy.worker_index, results)


main()
