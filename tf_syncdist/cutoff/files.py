"""Arrays in versioned .npz files, written in one go and checked before they are used."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# What NumPy and zipfile raise about files that are damaged or something else.
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def save(path: str | os.PathLike, kind: str, version: int, arrays: Mapping[str, object]) -> None:
    """Writes arrays to a file that says what it is.

    The file has its name only when it is complete, so nobody ever reads half of one.

    Args:
        path: The file, which is replaced if it exists; `.npz` is not appended.
        kind: What the file is, in words, such as "trace of run-times".
        version: The number of the file's format.
        arrays: Arrays, or what NumPy makes arrays of, by name.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, kind=kind, version=version, **arrays)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(
    path: str | os.PathLike, kind: str, version: int, error: type[Exception]
) -> dict[str, np.ndarray]:
    """Reads what `save` wrote. Nothing is unpickled.

    Args:
        path: The file.
        kind: What the file has to be.
        version: The only format that is understood.
        error: The class of what is raised.

    Returns:
        The arrays by name.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as e:
        raise error(
            f"Expected the file of a {kind}. Received: {str(path)!r}, which is not there."
        ) from e
    except _UNREADABLE as e:
        raise error(
            f"Expected the file of a {kind}, as tf_syncdist writes it. Received: {str(path)!r}, "
            f"which cannot be read ({type(e).__name__}: {e}). It is something else, or it was cut "
            "off or damaged; write it again."
        ) from e
    found = str(arrays.pop("kind", "something else"))
    if found != kind:
        raise error(
            f"Expected the file of a {kind}. Received: {str(path)!r}, which says that it is "
            f"{found!r}. Give the right file."
        )
    number = arrays.pop("version", np.array(None))
    if number.shape != () or number.dtype.kind not in "iu" or int(number) != version:
        raise error(
            f"Expected a {kind} of format {version}. Received: {str(path)!r}, which has format "
            f"{number}. It is of another version of tf_syncdist; write it again with this one."
        )
    return arrays
