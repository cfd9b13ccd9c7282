"""Keras callbacks for jobs of several workers."""

import os
import sys

import keras

from tf_syncdist.errors import BackupError
from tf_syncdist.strategies import adapter
from tf_syncdist.strategies.backups import BackupDirectory

__all__ = ["BackupAndRestore"]


class BackupAndRestore(keras.callbacks.Callback):
    """Lets a job that was killed as a whole go on where it was when it is started again.

    Give it to `fit` on all workers. Worker 0 saves the model's variables, the optimizer's and the
    epoch; at the beginning of a `fit` it restores them, the other workers take their variables
    from worker 0 as always, and all begin with the same epoch. Only worker 0 reads and writes
    files, so the directory may be on its machine alone. A worker that is started again while the
    others go on takes its state from them, not from a file.

    A file is written beside the one before it and then takes its place, so a job may be killed at
    any time. It is an .npz archive, and nothing of it is executed.

    The state of worker 0's random generators is saved too; those of other workers, and the order
    in which a dataset is shuffled, begin anew. Keras' other callbacks keep no state: an
    `EarlyStopping` counts from the beginning.

    Args:
        directory: Where the backups are: one directory for each training.
        save_freq: "epoch" (the default) saves after each epoch. An integer saves after so many
            steps as well; what is restored then is the state after that step, and its epoch is
            begun anew, so some examples are used twice. Give one if an epoch takes very long.
        keep: How many backups stay. Default: 1. With more, a file that has been damaged can be
            deleted to go on with the one before it.
        delete_checkpoint: Whether to delete the backups when `fit` ends as it should. Default:
            `True`, as Keras' own callback does; else a later `fit` goes on from the last one.

    Raises:
        ValueError: If an argument has a value that it cannot have.
        BackupError: At the beginning of `fit`, on all workers, if worker 0's file is damaged or
            is of another model.

    Example:

    >>> import keras, numpy, tempfile
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> backup = BackupAndRestore(tempfile.mkdtemp())
    >>> x, y = numpy.ones((8, 2)), numpy.ones((8, 1))
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[backup])
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        save_freq: str | int = "epoch",
        keep: int = 1,
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        if not os.fspath(directory):
            raise ValueError(
                f"`directory` must be the path of a directory. Received: directory={directory!r}."
            )
        is_number = isinstance(save_freq, int) and not isinstance(save_freq, bool)
        if save_freq != "epoch" and not (is_number and save_freq >= 1):
            raise ValueError(
                '`save_freq` must be "epoch" or a number of steps, at least 1. '
                f"Received: save_freq={save_freq!r}."
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(
                f"`keep` must be an integer of at least 1. Received: keep={keep!r}. One backup is "
                "what a job needs to go on."
            )
        self._backups = BackupDirectory(directory, keep)
        self._steps = save_freq if is_number else None
        self._delete = delete_checkpoint
        self._epoch = 0
        self._unsaved = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Restores the newest backup; is called by Keras."""
        model = self.model
        if not model.built:
            raise ValueError(
                "Expected a model whose variables exist, because they are to be restored. "
                f"Received: {model.name!r}, which is not built. Give it a keras.Input, or call it "
                "on a batch, before `fit`."
            )
        strategy = model.distribute_strategy
        if model.optimizer is not None and not model.optimizer.built:
            with strategy.scope():
                model.optimizer.build(model.trainable_variables)
        epoch, error = 0, None
        if self._is_chief:
            try:
                epoch = self._restore()
            except BackupError as e:
                error = e
        if hasattr(strategy, "_epoch_of_chief"):
            begins_with = strategy._epoch_of_chief(None if error is not None else epoch)
            if begins_with is None and error is None:
                error = BackupError(
                    "Expected worker 0 to restore its backup, because all workers begin with it. "
                    "Received: an error of worker 0; look at its log."
                )
            epoch = begins_with or 0
        if error is not None:
            raise error
        self._epoch, self._unsaved = epoch, 0
        if not self._is_chief and epoch >= self.params.get("epochs", sys.maxsize):
            self._restore_all_there_is()
        # Keras reads it after this. It keeps it from an earlier fit, too.
        adapter.set_initial_epoch(model, epoch or None)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Is called by Keras."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Saves after some steps; is called by Keras."""
        # Versions of Keras differ in which of several steps at once they call the batch.
        self._unsaved += self.model.steps_per_execution
        if self._steps is not None and self._unsaved >= self._steps:
            self._save(self._epoch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Saves after an epoch; is called by Keras."""
        is_last = epoch + 1 >= self.params.get("epochs", sys.maxsize)
        # A backup after the last epoch would be deleted in a moment, and a job that is started
        # again in that moment would train nothing, so that only worker 0 had the variables.
        if not (is_last and self._delete):
            self._save(epoch + 1)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Deletes the backups; is called by Keras."""
        adapter.set_initial_epoch(self.model, None)
        if self._is_chief and self._delete:
            self._backups.clear()

    @property
    def _is_chief(self) -> bool:
        return getattr(self.model.distribute_strategy, "is_chief", True)

    def _variables(self) -> list[keras.Variable]:
        optimizer = self.model.optimizer
        return [*self.model.variables, *(optimizer.variables if optimizer is not None else ())]

    def _restore(self) -> int:
        self._backups.tidy()
        file = self._backups.newest
        if file is None:
            return 0
        epoch = self._backups.restore(file, self._variables())
        print(f"tf_syncdist: goes on with epoch {epoch + 1} from {file}", file=sys.stderr)
        return epoch

    def _restore_all_there_is(self) -> None:
        """Reads the files as well, if they are here, since there will be no run to learn from."""
        file = self._backups.newest
        if file is not None:
            self._backups.restore(file, self._variables())
        else:
            print(
                "tf_syncdist: the backup is from the end of the training, so nothing is trained, "
                "and this worker, which cannot read it, keeps its initial variables",
                file=sys.stderr,
            )

    def _save(self, epoch: int) -> None:
        self._unsaved = 0
        if self._is_chief:
            self._backups.save(epoch, self._variables())
