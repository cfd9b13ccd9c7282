"""Tests of how the example trainers read their data and flags."""

import gzip
import importlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def _examples_importable() -> Iterator[None]:
    """Puts the examples where a script among them would find its neighbours."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def mnist_data() -> ModuleType:
    return importlib.import_module("mnist_data")


@pytest.fixture(scope="module")
def train_mnist() -> ModuleType:
    return importlib.import_module("train_mnist")


def idx_bytes(array: np.ndarray) -> bytes:
    """Encodes unsigned bytes in the IDX format."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_pair(directory: Path, prefix: str, count: int, zipped: bool = False) -> None:
    """Writes `count` images, each filled with its own number, whose labels go round 0 to 9."""
    images = np.broadcast_to(np.arange(count).reshape(-1, 1, 1) % 256, (count, 4, 3))
    for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
        content = idx_bytes(array)
        path = directory / f"{prefix}-{name}-ubyte"
        if zipped:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
def test_reads_training_and_test_files(
    mnist_data: ModuleType, tmp_path: Path, zipped: bool
) -> None:
    write_pair(tmp_path, "train", 20, zipped)
    write_pair(tmp_path, "t10k", 10, zipped)
    data = mnist_data.load_mnist(str(tmp_path))
    assert data.x_train.shape == (20, 4, 3)
    assert data.x_train.dtype == np.float32
    np.testing.assert_allclose(data.x_train[:, 0, 0], np.arange(20, dtype=np.float32) / 255)
    np.testing.assert_array_equal(data.y_train, np.arange(20) % 10)
    np.testing.assert_array_equal(data.y_test, np.arange(10))


def test_unzipped_download_that_kept_its_name_is_read(
    mnist_data: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(idx_bytes(np.arange(5)))
    np.testing.assert_array_equal(mnist_data.read_idx(path, 1), np.arange(5))


@pytest.mark.parametrize("prefix", ["t10k", "train"])
def test_single_pair_holds_out_the_same_tenth_each_time(
    mnist_data: ModuleType, tmp_path: Path, prefix: str
) -> None:
    write_pair(tmp_path, prefix, 200, zipped=True)
    data, again = (mnist_data.load_mnist(str(tmp_path)) for _ in range(2))
    for array, same in zip(data, again, strict=True):
        np.testing.assert_array_equal(array, same)
    numbers = np.concatenate([data.x_train, data.x_test])[:, 0, 0] * 255
    assert sorted(np.rint(numbers)) == list(range(200))
    assert np.bincount(data.y_test, minlength=10).tolist() == [2] * 10


def test_held_out_examples_do_not_change_between_releases(mnist_data: ModuleType) -> None:
    images = np.arange(40).reshape(-1, 1, 1)
    data = mnist_data.hold_out(images, np.arange(40) % 4, every=10)
    assert data.x_test.ravel().tolist() == [15, 20, 22, 25]


def test_digits_hold_out_a_fifth_of_each_class(mnist_data: ModuleType) -> None:
    pytest.importorskip("sklearn")
    data = mnist_data.load_digits()
    assert data.x_train.shape == (1437, 8, 8)
    assert data.x_test.shape == (360, 8, 8)
    assert data.x_train.max() == 1.0
    assert np.bincount(data.y_test).min() >= 34


def test_digits_without_scikit_learn_name_the_extra(
    mnist_data: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'tf-syncdist\[examples\]'"):
        mnist_data.load_digits()


def test_empty_directory_names_the_expected_files(mnist_data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\[.gz\].*Received: none"):
        mnist_data.load_mnist(str(tmp_path))


def test_images_without_labels_name_the_missing_file(
    mnist_data: ModuleType, tmp_path: Path
) -> None:
    write_pair(tmp_path, "t10k", 10)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"Add t10k-labels-idx1-ubyte\[.gz\]"):
        mnist_data.load_mnist(str(tmp_path))


def test_different_numbers_of_images_and_labels(mnist_data: ModuleType, tmp_path: Path) -> None:
    write_pair(tmp_path, "t10k", 10)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(9)))
    with pytest.raises(ValueError, match=r"Received: 10 images in .* and 9 labels"):
        mnist_data.load_mnist(str(tmp_path))


def test_label_out_of_range(mnist_data: ModuleType, tmp_path: Path) -> None:
    write_pair(tmp_path, "t10k", 11)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(11)))
    with pytest.raises(ValueError, match=r"labels from 0 to 9. Received: 10"):
        mnist_data.load_mnist(str(tmp_path))


IMAGES = idx_bytes(np.zeros((2, 4, 3)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bytes 00 00 08 03. Received: an empty file"),
        (idx_bytes(np.arange(5)), r"bytes 00 00 08 03. Received: 00 00 08 01"),
        (IMAGES[:9], r"header of 16 bytes. Received: 9 bytes"),
        (IMAGES[:-1], r"expected 40 bytes .* Received: 39.*truncated"),
        (IMAGES + b"x", r"expected 40 bytes .* Received: 41.*longer"),
        (gzip.compress(IMAGES)[:-6], r"complete gzip file"),
        (gzip.compress(IMAGES)[:12] + b"\xff" * 12, r"complete gzip file"),
        (gzip.compress(IMAGES[:-1]), r"Received: 39.*truncated"),
    ],
    ids=["empty", "labels", "cut header", "cut", "too long", "cut gzip", "bad gzip", "cut inside"],
)
def test_damaged_file(mnist_data: ModuleType, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        mnist_data.read_idx(path, 3)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("2:0.5", (2, 0.5, 1.0)), ("0:1:0.25", (0, 1.0, 0.25)), ("1:0:0", (1, 0, 0))],
)
def test_slow_worker_flag(
    train_mnist: ModuleType, text: str | None, expected: tuple[int, float, float] | None
) -> None:
    assert train_mnist.parse_slowness("slow_worker", text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_bad_learners_flag(train_mnist: ModuleType, text: str) -> None:
    assert train_mnist.parse_learners("2") == 2 and train_mnist.parse_learners("auto") == "auto"
    with pytest.raises(ValueError, match="expected a number from 1, or auto. Received: '"):
        train_mnist.parse_learners(text)


@pytest.mark.parametrize(
    "text", ["", "2", "a:1", "1:b", "1:1:x", "1:1:1:1", "-1:1", "1:-1", "1:inf", "1:1:2", "1:nan"]
)
def test_bad_slow_worker_flag(train_mnist: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match=r"expected INDEX:SECONDS\[:PROBABILITY\].*Received: "):
        train_mnist.parse_slowness("slow_worker", text)


def count_sleeps(
    train_mnist: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    slow_worker: str,
    worker: int = 1,
    training: bool = True,
) -> list[int]:
    """Returns how often the delay slept by the end of each of 20 steps of a graph."""
    import tensorflow as tf

    slept: list[float] = []
    monkeypatch.setattr(train_mnist.time, "sleep", slept.append)
    slow = train_mnist.parse_slowness("slow_worker", slow_worker)
    delay = train_mnist.Delay(train_mnist.Sleeper(slow, worker, seed=3))

    @tf.function
    def step(inputs: tf.Tensor) -> tf.Tensor:
        return delay(inputs, training=training)

    sleeps = []
    for i in range(20):
        assert float(step(tf.constant(float(i)))) == i
        sleeps.append(len(slept))
    monkeypatch.undo()
    assert delay.weights == []
    return sleeps


def test_delay_sleeps_in_every_training_step_of_its_worker(
    train_mnist: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_sleeps(train_mnist, monkeypatch, "1:9") == list(range(1, 21))
    assert count_sleeps(train_mnist, monkeypatch, "1:9", worker=0)[-1] == 0
    assert count_sleeps(train_mnist, monkeypatch, "1:9", training=False)[-1] == 0


def test_delay_with_a_probability_is_the_same_in_every_run(
    train_mnist: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps = count_sleeps(train_mnist, monkeypatch, "1:9:0.5")
    assert 0 < sleeps[-1] < 20
    assert sleeps == count_sleeps(train_mnist, monkeypatch, "1:9:0.5")
    assert sleeps != count_sleeps(train_mnist, monkeypatch, "0:9:0.5", worker=0)
