"""Files that hold a model, its optimizer and how far its training has come.

A file is an .npz archive of plain arrays. The first of them is JSON, which says what the others
are; nothing is ever unpickled. Files are written under another name first, so a file with its
right name is always whole.
"""

import contextlib
import json
import os
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_syncdist.errors import BackupError

_FORMAT = "tf_syncdist backup 1"
_CONTENTS = "contents"
# Keras numbers the names that it gives, in the order in which a process builds things.
_NUMBERS = re.compile(r"_\d+(?=[_/]|$)")
_PREFIX, _SUFFIX, _UNFINISHED = "backup-", ".npz", ".unfinished"


class Contents(NamedTuple):
    """What a backup says about itself.

    Args:
        epoch: The epoch with which training goes on.
        variables: Path, dtype and shape of every variable, in the order of the arrays.
    """

    epoch: int
    variables: list[tuple[str, str, tuple[int, ...]]]


class BackupDirectory:
    """The backups of one training.

    Args:
        path: A directory, which is made if it is not there.
        keep: How many backups stay.
    """

    def __init__(self, path: str | os.PathLike, keep: int) -> None:
        self._path = pathlib.Path(path)
        self._keep = keep

    @property
    def newest(self) -> pathlib.Path | None:
        """The file with which to go on, if there is one."""
        return max(self._files(), default=None)

    def save(self, epoch: int, variables: Sequence[Any]) -> None:
        """Writes a backup and deletes those that are too many.

        Args:
            epoch: The epoch with which training is to go on.
            variables: Keras variables.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        values = [np.asarray(v.numpy()) for v in variables]
        found = [(v.path, a.dtype.name, a.shape) for v, a in zip(variables, values, strict=True)]
        contents = {"format": _FORMAT, **Contents(epoch, found)._asdict()}
        arrays = {
            _CONTENTS: np.frombuffer(json.dumps(contents).encode(), np.uint8),
            **{_name(i): _plain(value) for i, value in enumerate(values)},
        }
        last = self.newest
        number = int(last.stem.removeprefix(_PREFIX)) + 1 if last is not None else 0
        self._write(self._path / f"{_PREFIX}{number:08d}{_SUFFIX}", arrays)
        self._delete(sorted(self._files())[: -self._keep])

    def restore(self, file: pathlib.Path, variables: Sequence[Any]) -> int:
        """Reads a backup into variables; none is changed if the file cannot be used.

        Args:
            file: One of this directory.
            variables: Keras variables.

        Returns:
            The epoch with which training goes on.

        Raises:
            BackupError: If the file is damaged, or is of another model.
        """
        remedy = (
            "Delete it to go on with an older one of the same directory, or else from the "
            "beginning."
        )
        try:
            with np.load(file, allow_pickle=False) as archive:
                contents = json.loads(archive[_CONTENTS].tobytes())
                if contents.pop("format") != _FORMAT:
                    raise ValueError("it has another format")
                epoch, found = Contents(**contents)
                _check(file, found, variables)
                values = [
                    _value(archive[_name(i)], dtype, shape)
                    for i, (_, dtype, shape) in enumerate(found)
                ]
        except BackupError:
            raise
        except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as e:
            raise BackupError(
                f"Expected a backup of BackupAndRestore in {file}. Received: a file that cannot be "
                f"read as one ({type(e).__name__}: {e}). {remedy}"
            ) from e
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return epoch

    def tidy(self) -> None:
        """Deletes what an interrupted `save` has left behind."""
        self._delete(self._path.glob(f"{_PREFIX}*{_UNFINISHED}"))

    def clear(self) -> None:
        """Deletes all backups, and the directory if nothing else is in it."""
        self.tidy()
        self._delete(self._files())
        with contextlib.suppress(OSError):
            self._path.rmdir()

    def _files(self) -> list[pathlib.Path]:
        digits = "[0-9]" * 8
        return list(self._path.glob(f"{_PREFIX}{digits}{_SUFFIX}"))

    def _write(self, path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
        # In the same directory, since a file can be renamed within a file system only.
        fd, unfinished = tempfile.mkstemp(_UNFINISHED, _PREFIX, self._path)
        try:
            with open(fd, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        directory = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @staticmethod
    def _delete(paths: Any) -> None:
        for path in paths:
            path.unlink(missing_ok=True)


def _name(index: int) -> str:
    return f"variable_{index}"


def _plain(value: np.ndarray) -> np.ndarray:
    """Returns an array of one of NumPy's own types, which bfloat16 is not."""
    if value.dtype.isbuiltin == 1:
        return value
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _value(array: np.ndarray, dtype: str, shape: Sequence[int]) -> np.ndarray:
    if array.dtype != np.dtype(dtype):
        array = array.view(np.dtype(dtype))
    return array.reshape(shape)


def _unnumbered(path: str) -> str:
    return _NUMBERS.sub("", path)


def _check(file: pathlib.Path, found: Sequence[Sequence], variables: Sequence[Any]) -> None:
    """Compares the variables of a backup with those of a model."""
    there = [(path, dtype, tuple(shape)) for path, dtype, shape in found]
    wanted = [(v.path, np.asarray(v.numpy()).dtype.name, tuple(v.shape)) for v in variables]
    for stored, own in zip(there, wanted, strict=False):
        if (_unnumbered(stored[0]), *stored[1:]) != (_unnumbered(own[0]), *own[1:]):
            break
    else:
        if len(there) == len(wanted):
            return
        stored, own = f"{len(there)} variables", f"{len(wanted)} variables"
    raise BackupError(
        f"Expected a backup of this model and optimizer in {file}: {own}. Received: {stored}. Use "
        "a directory of its own for each training, or delete the file to begin anew."
    )
