"""Trains with Keras' fit, whatever happens."""

import keras
import member
import numpy as np

import tf_syncdist

BATCH_SIZE = 12


def main() -> None:
    arguments = member.ARGUMENTS
    steps, epochs = arguments["steps"], arguments["epochs"]
    strategy = tf_syncdist.SyncReplicasStrategy(
        arguments.get("backup_workers", 0),
        transport=arguments.get("transport", "auto"),
        **member.PATIENCE,
    )
    x = np.random.RandomState(1).randn(BATCH_SIZE * steps, 16).astype("float32")
    y = x[:, :4].argmax(1)
    model, optimizer = member.model_and_optimizer(strategy)
    with strategy.scope():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
    trace = member.Trace(optimizer, model.trainable_variables)
    history = model.fit(
        x,
        y,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[member.Callback(trace)],
    )
    member.write(strategy, model, optimizer, epochs=history.epoch)


main()
