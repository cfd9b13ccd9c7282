"""Reads the handwritten digits the example trainers learn from."""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_CLASSES = 10
_UBYTE_IDX_CODE = 8
_GZIP_MAGIC = b"\x1f\x8b"


class Dataset(NamedTuple):
    """Images scaled to 0..1 and their labels, for training and for testing."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_digits() -> Dataset:
    """Loads scikit-learn's bundled 8x8 digits, a fixed fifth of them for testing.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "Expected scikit-learn, which has the digits dataset in it. "
            f"Received: {error}. Install it with: pip install 'tf-syncdist[examples]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16.0
    return hold_out(images, labels.astype(np.int64), every=5)


def load_mnist(data_dir: str | None = None) -> Dataset:
    """Loads MNIST from the IDX files in `data_dir`, or with Keras' own loader without one.

    The files have their standard names, gzipped or not. When only the training files or only
    the t10k files are there, a fixed tenth of their images is held out for testing.

    Raises:
        FileNotFoundError: there is no pair of images and labels.
        ValueError: a file is damaged, or images and labels do not belong together.
    """
    if not data_dir:
        import keras

        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
        return Dataset(_scale(x_train), y_train.astype(np.int64),
                       _scale(x_test), y_test.astype(np.int64))  # fmt: skip
    directory = Path(data_dir)
    train = _read_pair(directory, "train")
    test = _read_pair(directory, "t10k")
    if train and test:
        return Dataset(*train, *test)
    only = train or test
    if only is None:
        raise FileNotFoundError(
            "Expected MNIST's train-images-idx3-ubyte[.gz] and train-labels-idx1-ubyte[.gz], or "
            f"the same names with t10k. Received: none of them in {str(directory)!r}. Point "
            "--data_dir at the directory that has the files, or leave it out to download MNIST."
        )
    return hold_out(*only, every=10)


def hold_out(images: np.ndarray, labels: np.ndarray, every: int) -> Dataset:
    """Holds out one image in `every` for testing: always the same ones, evenly from each class."""
    # RandomState's streams are frozen across NumPy releases, so the split is the same everywhere.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[by_class[::every]] = True
    return Dataset(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or plain.

    Args:
        path: The file.
        dimensions: How many dimensions it must have: 3 for images, 1 for labels.

    Raises:
        ValueError: the file is something else, or is not complete.
    """
    content = _read_unzipped(path)
    header_bytes = 4 + 4 * dimensions
    expected_magic = bytes([0, 0, _UBYTE_IDX_CODE, dimensions])
    if content[:4] != expected_magic:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes in {dimensions} dimension(s), which "
            f"starts with the bytes {expected_magic.hex(' ')}. Received: "
            f"{content[:4].hex(' ') or 'an empty file'}. "
            "Check that images and labels are not swapped, or get the file again."
        )
    if len(content) < header_bytes:
        raise ValueError(
            f"{path}: expected a header of {header_bytes} bytes. Received: {len(content)} bytes. "
            "The file is truncated: get it again."
        )
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4).tolist()
    expected_bytes = header_bytes + math.prod(shape)
    if len(content) != expected_bytes:
        problem = "truncated" if len(content) < expected_bytes else "longer than it should be"
        raise ValueError(
            f"{path}: expected {expected_bytes} bytes for the shape {tuple(shape)} in its header. "
            f"Received: {len(content)} bytes. The file is {problem}: get it again."
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _read_unzipped(path: Path) -> bytes:
    """Reads a file's bytes, unpacked when they are gzipped, whatever the file's name says."""
    content = path.read_bytes()
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a complete gzip file. Received: one that cannot be unpacked "
            f"({error}). It is truncated or damaged: get it again."
        ) from error


def _read_pair(directory: Path, prefix: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads the images and labels called `prefix`, or returns None when neither file is there."""
    images_path = _find(directory, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(directory, f"{prefix}-labels-idx1-ubyte")
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        missing = "images-idx3" if images_path is None else "labels-idx1"
        raise FileNotFoundError(
            f"Expected both images and labels in {str(directory)!r}. Received: only "
            f"{(images_path or labels_path).name}. Add {prefix}-{missing}-ubyte[.gz]."
        )
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ValueError(
            f"Expected as many labels as images. Received: {len(images)} images in {images_path} "
            f"and {len(labels)} labels in {labels_path}. Use two files of the same data set."
        )
    if labels.size and labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"{labels_path}: expected labels from 0 to {NUM_CLASSES - 1}. Received: "
            f"{labels.max()}. Use the label file of MNIST."
        )
    return _scale(images), labels.astype(np.int64)


def _find(directory: Path, name: str) -> Path | None:
    """Returns the plain file of that name or the gzipped one, whichever is there."""
    return next((p for p in (directory / name, directory / f"{name}.gz") if p.is_file()), None)


def _scale(images: np.ndarray) -> np.ndarray:
    """Turns bytes into floats from 0 to 1."""
    return images.astype(np.float32) / 255.0
