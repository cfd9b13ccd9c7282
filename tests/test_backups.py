"""Backups of one process: what is in them, and what is not accepted as one."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tf_syncdist.callbacks import BackupAndRestore
from tf_syncdist.errors import BackupError

STEPS, EPOCHS = 5, 4
X = np.random.RandomState(0).randn(4 * STEPS, 3).astype("float32")
Y = X[:, :1] ** 2


def build(optimizer: Any = "adam", dtype: str | None = None, units: int = 8) -> keras.Model:
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(units, dtype=dtype),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )
    model.compile(optimizer, "mse")
    return model


class Stops(keras.callbacks.Callback):
    """Ends a fit by an exception, in the middle of an epoch."""

    def __init__(self, epoch: int, batch: int = 2) -> None:
        super().__init__()
        self.at = (epoch, batch)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (self.epoch, batch) == self.at:
            raise InterruptedError


def fit(model: keras.Model, *callbacks: keras.callbacks.Callback, epochs: int = EPOCHS) -> dict:
    found = model.fit(
        X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    return found.history


def values(model: keras.Model) -> list[np.ndarray]:
    return [np.asarray(v.numpy()) for v in (*model.variables, *model.optimizer.variables)]


def interrupted(path: Path, epoch: int, batch: int = 2, **kwargs: Any) -> None:
    with pytest.raises(InterruptedError):
        fit(build(), BackupAndRestore(path, **kwargs), Stops(epoch, batch))


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "averaged": lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_overwrite_frequency=3),
    "accumulating": lambda: keras.optimizers.SGD(0.01, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "scheduled": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 20)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    whole = build(OPTIMIZERS[name]())
    history = fit(whole)
    first = build(OPTIMIZERS[name]())
    with pytest.raises(InterruptedError):
        fit(first, BackupAndRestore(tmp_path / "at"), Stops(2))
    second = build(OPTIMIZERS[name]())
    rest = fit(second, BackupAndRestore(tmp_path / "at"))
    assert rest["loss"] == pytest.approx(history["loss"][2:], rel=1e-5)
    # The dropped units, too, are those that they would have been.
    for one, other in zip(values(whole), values(second), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "at").exists()


def test_bfloat16_and_learning_rates_are_kept(tmp_path: Path) -> None:
    first = build(dtype="bfloat16")
    with pytest.raises(InterruptedError):
        fit(
            first,
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5**epoch),
            BackupAndRestore(tmp_path),
            Stops(1, 0),
        )
    second = build(dtype="bfloat16")
    backup = BackupAndRestore(tmp_path)
    backup.set_model(second)
    backup.set_params({"epochs": EPOCHS})
    backup.on_train_begin()
    assert float(second.optimizer.learning_rate.numpy()) == 1.0
    assert second.variables[0].dtype == "bfloat16"
    assert int(second.optimizer.iterations.numpy()) == STEPS
    assert second._initial_epoch == 1


def test_an_epoch_is_begun_anew_if_it_was_saved_within(tmp_path: Path) -> None:
    interrupted(tmp_path, 1, batch=3, save_freq=4)
    model = build()
    history = fit(model, BackupAndRestore(tmp_path, save_freq=4))
    assert len(history["loss"]) == 3
    # Saved after steps 4, 5 (an epoch) and 9; epochs 1 to 3 follow.
    assert int(model.optimizer.iterations.numpy()) == 9 + 3 * STEPS


def test_several_steps_at_once_are_counted(tmp_path: Path) -> None:
    model = build()
    model.compile("adam", "mse", steps_per_execution=2)
    files = []

    def note(batch: int, logs: dict | None = None) -> None:
        files.append(len(list(tmp_path.iterdir())))

    backup = BackupAndRestore(tmp_path, save_freq=4, keep=9)
    fit(model, backup, keras.callbacks.LambdaCallback(on_train_batch_end=note), epochs=1)
    assert files == [0, 1, 1]


def test_so_many_backups_stay(tmp_path: Path) -> None:
    interrupted(tmp_path, 3, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "backup-00000001.npz",
        "backup-00000002.npz",
    ]
    (tmp_path / "backup-00000002.npz").unlink()
    assert len(fit(build(), BackupAndRestore(tmp_path))["loss"]) == 2


def test_what_a_killed_save_left_is_tidied_up_and_other_files_stay(tmp_path: Path) -> None:
    interrupted(tmp_path, 1)
    (tmp_path / "backup-abc.unfinished").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("keep")
    assert len(fit(build(), BackupAndRestore(tmp_path))["loss"]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_kept_backups_of_a_finished_training_leave_nothing_to_do(tmp_path: Path) -> None:
    first, second = build(), build()
    fit(first, BackupAndRestore(tmp_path, delete_checkpoint=False))
    history = fit(second, BackupAndRestore(tmp_path, delete_checkpoint=False))
    assert history == {}
    for one, other in zip(values(first), values(second), strict=True):
        np.testing.assert_array_equal(one, other)
    more = fit(second, BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=EPOCHS + 1)
    assert len(more["loss"]) == 1


class Harm:
    """Must never come to life."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a file was unpickled",))


def spoil(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[data.index(b"kernel")] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Harm()))
    elif how == "pickled array":
        with zipfile.ZipFile(path, "w") as archive, archive.open("contents.npy", "w") as file:
            np.lib.format.write_array(file, np.array([Harm()], dtype=object))
    elif how == "foreign":
        np.savez(path, contents=np.frombuffer(b'{"format": "other"}', np.uint8))


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "pickle", "pickled array", "foreign"])
def test_a_damaged_or_foreign_file_is_an_error_that_names_it(how: str, tmp_path: Path) -> None:
    interrupted(tmp_path, 1)
    (file,) = tmp_path.iterdir()
    spoil(file, how)
    model = build()
    before = values(model)
    with pytest.raises(BackupError, match="Delete it to go on") as error:
        fit(model, BackupAndRestore(tmp_path))
    assert str(file) in str(error.value)
    for one, other in zip(before, values(model), strict=False):
        np.testing.assert_array_equal(one, other)
    assert file.exists()


def test_a_backup_of_another_model_is_an_error_that_names_the_difference(tmp_path: Path) -> None:
    interrupted(tmp_path, 1)
    with pytest.raises(BackupError, match=r"kernel.*\(3, 9\).*\(3, 8\)"):
        fit(build(units=9), BackupAndRestore(tmp_path))
    with pytest.raises(BackupError, match="adam|sgd|variables"):
        fit(build("sgd"), BackupAndRestore(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [{"directory": ""}, {"save_freq": 0}, {"save_freq": "batch"}, {"save_freq": True}, {"keep": 0}],
)
def test_wrong_arguments_are_refused(arguments: dict, tmp_path: Path) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        BackupAndRestore(**{"directory": tmp_path, **arguments})


def test_a_model_without_variables_is_refused(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="is not built"):
        fit(model, BackupAndRestore(tmp_path))
