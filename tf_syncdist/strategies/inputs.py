"""Divides training input among workers.

Every batch of the user's dataset is an update's batch. It is cut into N pieces; the pieces of all
batches, one after the other, are dealt out to the N + b workers in turn. With b = 0 worker w gets
piece w of every batch. With backup workers a pass over the data is dealt out before an epoch is
over, so the data is repeated; the epoch still has the announced number of batches.
"""

from typing import Any

import tensorflow as tf

from tf_syncdist.strategies import adapter


def divide(dataset: tf.data.Dataset, pieces: int, worker: int, num_workers: int) -> tf.data.Dataset:
    """Returns one worker's share of a batched dataset.

    Args:
        dataset: The whole dataset; every worker must see it in the same order.
        pieces: N, how many contributions make an update.
        worker: Index of this worker.
        num_workers: N + b.

    Returns:
        A dataset with as many batches as `dataset`, each 1 / N as large.

    Raises:
        ValueError: If the batch size is not divisible by N.
    """
    batch_size = adapter.static_batch_size(dataset)
    if batch_size is not None:
        check_divisible(batch_size, pieces)
    cardinality = int(dataset.cardinality())
    if num_workers == pieces:
        return _deal(dataset, pieces, worker, num_workers)
    if cardinality == tf.data.UNKNOWN_CARDINALITY:
        # Without a known length nobody can say when the epoch ends for the others, so every
        # worker takes one piece of every batch, and b of the pieces are computed twice.
        return dataset.enumerate().map(
            lambda k, batch: _piece(batch, tf.cast(k + worker, tf.int32) % pieces, pieces)
        )
    mine = _deal(dataset.repeat(), pieces, worker, num_workers)
    return mine if cardinality == tf.data.INFINITE_CARDINALITY else mine.take(cardinality)


def divide_arrays(
    dataset: tf.data.Dataset, pieces: int, worker: int, num_workers: int
) -> tf.data.Dataset:
    """Returns one worker's share of the dataset that Keras makes of arrays, without end.

    Keras knows how many batches an epoch has, and takes as many. A dataset that it starts anew
    for each epoch would shuffle alike in every epoch, since the seed is common to all workers.

    Args:
        dataset: The whole dataset.
        pieces: N, how many contributions make an update.
        worker: Index of this worker.
        num_workers: N + b.
    """
    return _deal(dataset.repeat(), pieces, worker, num_workers)


class ContinuedDataset:
    """A distributed dataset without end that goes on where the last epoch ended.

    Args:
        dataset: The distributed dataset.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._built = False
        self._iterator: Any = None

    def __iter__(self) -> Any:
        if not self._built:
            # Keras looks at a first batch to build the model; training starts with it again.
            self._built = True
            return iter(self._dataset)
        if self._iterator is None:
            self._iterator = iter(self._dataset)
        return self._iterator


def check_divisible(batch_size: int, pieces: int) -> None:
    """Raises a ValueError if a batch cannot be cut into N equal pieces."""
    if batch_size % pieces:
        raise ValueError(
            "The batch size must be divisible by N = workers - backup_workers, because each of the "
            "N contributions to an update is computed from 1 / N of a batch. "
            f"Received: batch_size={batch_size} with N={pieces}. "
            f"Use {batch_size // pieces * pieces or pieces} or "
            f"{(batch_size // pieces + 1) * pieces}."
        )


def _deal(dataset: tf.data.Dataset, pieces: int, worker: int, num_workers: int) -> tf.data.Dataset:
    """Deals out the pieces of all batches in turn."""
    if num_workers == pieces:
        return dataset.map(lambda *batch: _piece(_unstar(batch), worker, pieces))
    return (
        dataset.enumerate()
        .map(lambda k, batch: (_first_piece(k, pieces, worker, num_workers), batch))
        .filter(lambda index, batch: index < pieces)
        .map(lambda index, batch: _piece(batch, index, pieces))
    )


def _unstar(batch: tuple) -> Any:
    return batch[0] if len(batch) == 1 else batch


def _first_piece(k: tf.Tensor, pieces: int, worker: int, num_workers: int) -> tf.Tensor:
    """Returns which piece of batch k is this worker's; `pieces` or more if none is."""
    return tf.cast((worker - k * pieces) % num_workers, tf.int32)


def _piece(batch: Any, index: Any, pieces: int) -> Any:
    sizes = [
        tf.shape(t, out_type=tf.int64)[0] for t in tf.nest.flatten(batch) if _has_batch_axis(t)
    ]
    if not sizes:
        return batch
    size = sizes[0]
    each = -(-size // pieces)
    # A last batch of fewer examples than pieces has no example for some: they repeat one.
    start = tf.cast(index, tf.int64) * each % tf.maximum(size, 1)
    stop = tf.minimum(start + each, size)

    def cut(tensor: Any) -> Any:
        if isinstance(tensor, tf.SparseTensor):
            rest = tensor.dense_shape[1:]
            return tf.sparse.slice(
                tensor,
                tf.concat([[start], tf.zeros_like(rest)], 0),
                tf.concat([[stop - start], rest], 0),
            )
        return tensor[start:stop] if _has_batch_axis(tensor) else tensor

    return tf.nest.map_structure(cut, batch)


def _has_batch_axis(tensor: Any) -> bool:
    return getattr(tensor, "shape", None) is not None and tensor.shape.rank != 0
