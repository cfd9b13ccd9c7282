"""Trains a model that is not the same on every worker."""

import keras
import numpy as np
import task

import tf_syncdist

strategy = tf_syncdist.SyncReplicasStrategy(**task.PATIENCE)
units = 5 if strategy.worker_index == task.ARGUMENTS["different"] else 6
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, name="alike"),
            keras.layers.Dense(units, name="unlike"),
            keras.layers.Dense(1, name="last"),
        ]
    )
    model.compile("adam", "mse")
model.fit(np.zeros((64, 4)), np.zeros((64, 1)), batch_size=32, verbose=0)
