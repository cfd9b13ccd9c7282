"""Trains learners by model averaging, whatever happens."""

import member
import numpy as np
import tensorflow as tf

import tf_syncdist

BATCH_SIZE = 4


class Trace(member.Trace):
    """Notes the central model only: what optimizers hold is each worker's own."""

    def note(self) -> None:
        """Adds a line."""
        rounds = int(self._optimizer.iterations.numpy())
        member.linger(rounds)
        sha256 = tf_syncdist.variables_sha256(self._variables)
        self._file.write(f"{rounds} {sha256}\n")


def main() -> None:
    arguments = member.ARGUMENTS
    patience = {k: v for k, v in member.PATIENCE.items() if k != "bucket_bytes"}
    strategy = tf_syncdist.ModelAveragingStrategy(arguments["learners"], **patience)
    steps = arguments["steps"]
    x = np.random.RandomState(1).randn(BATCH_SIZE * 4 * steps, 16).astype("float32")
    # However many learners there are.
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :4])).batch(BATCH_SIZE).repeat()
    model, optimizer = member.model_and_optimizer(strategy)
    with strategy.scope():
        model.compile(optimizer, "mse")
    trace = Trace(optimizer, model.trainable_variables)
    history = model.fit(
        data,
        epochs=arguments["epochs"],
        steps_per_epoch=steps,
        verbose=0,
        callbacks=[member.Callback(trace)],
    )
    member.write(
        strategy,
        model,
        optimizer,
        optimizer_sha256="each worker's own",
        epochs=history.epoch,
        learners=strategy.learners_per_worker,
        apart=strategy.distances(),
        loss=history.history["loss"][-1],
    )


main()
