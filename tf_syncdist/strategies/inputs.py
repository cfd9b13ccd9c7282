"""Divides training input among workers.

Every batch of the user's dataset is an update's batch. It is cut into N pieces; the pieces of all
batches, one after the other, are dealt out to the N + b workers in turn. With b = 0 worker w gets
piece w of every batch. With backup workers a pass over the data is dealt out before an epoch is
over, so the data is repeated; the epoch still has the announced number of batches.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_syncdist.strategies import adapter, iterators

# AutoGraph takes a fifth of a second for these functions, and would find nothing to convert.
as_it_is = tf.autograph.experimental.do_not_convert


def divide(dataset: tf.data.Dataset, pieces: int, worker: int, num_workers: int) -> tf.data.Dataset:
    """Returns one worker's share of a batched dataset.

    The auto-shard option of the dataset is honoured: by default and with DATA its batches are dealt
    out, with FILE or HINT TensorFlow gives each worker its files, and with OFF the dataset is this
    worker's own. With the latter three a batch is cut into N, of which an update takes one from
    each worker.

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
    if is_sharded_by_user(dataset):
        return _cut_own(dataset, pieces, worker, num_workers, batch_size)
    if num_workers == pieces:
        return _deal(dataset, pieces, worker, num_workers)
    if cardinality == tf.data.UNKNOWN_CARDINALITY:
        # Without a known length nobody can say when the epoch ends for the others, so every
        # worker takes one piece of every batch, and b of the pieces are computed twice.
        return dataset.enumerate().map(
            as_it_is(lambda k, batch: piece(batch, tf.cast(k + worker, tf.int32) % pieces, pieces))
        )
    mine = _deal(dataset.repeat(), pieces, worker, num_workers)
    return mine if cardinality == tf.data.INFINITE_CARDINALITY else mine.take(cardinality)


def is_sharded_by_user(dataset: tf.data.Dataset) -> bool:
    """Returns whether the option of a dataset asks for another division than that of batches."""
    policy = dataset.options().experimental_distribute.auto_shard_policy
    return policy in (_Policy.OFF, _Policy.FILE, _Policy.HINT)


def _cut_own(
    dataset: tf.data.Dataset, pieces: int, worker: int, num_workers: int, batch_size: int | None
) -> tf.data.Dataset:
    if batch_size is None:
        raise ValueError(
            "Expected a dataset of batches of one size, because its auto-shard option gives each "
            "worker a share of its own. Received: batches of unknown size. Use `batch`, or leave "
            "the option at its default."
        )
    if dataset.options().experimental_distribute.auto_shard_policy is not _Policy.OFF:
        dataset = adapter.shard_by_files(dataset, num_workers, worker)
    return dataset.rebatch(batch_size // pieces)


def split(dataset: tf.data.Dataset, devices: int) -> tf.data.Dataset:
    """Cuts each batch into one for each device of a worker."""
    if devices == 1:
        return dataset

    @as_it_is
    def cut(*batch: Any) -> Any:
        whole = _unstar(batch)
        return adapter.per_replica([piece(whole, tf.constant(i), devices) for i in range(devices)])

    return dataset.map(cut)


def group(dataset: tf.data.Dataset, devices: int) -> tf.data.Dataset:
    """Takes one batch after the other for each device of a worker; a rest is left out."""
    if devices == 1:
        return dataset

    @as_it_is
    def together(*windows: Any) -> tf.data.Dataset:
        # A window of nests is a nest of windows.
        elements = tf.data.Dataset.zip(_unstar(windows))
        parts = tf.data.Dataset.zip(tuple(elements.skip(i).take(1) for i in range(devices)))
        return parts.map(as_it_is(lambda *values: adapter.per_replica(values)))

    return dataset.window(devices, drop_remainder=True).flat_map(together)


def piece_of_arrays(data: Any, index: int, pieces: int) -> Any:
    """Returns one of N pieces of a batch that is given as arrays."""

    def cut(array: Any) -> Any:
        if not getattr(array, "shape", None):
            return array
        each = -(-len(array) // pieces)
        start = index * each % max(len(array), 1)
        return array[start : start + each]

    return tf.nest.map_structure(cut, data)


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


_Policy = tf.data.experimental.AutoShardPolicy

# Keras (3.10 to 3.15) knows a distributed dataset by the name of its class and the package of its
# module, which are those of TensorFlow's own one, and refuses others in `fit`.
_KnownToKeras = type(
    "DistributedDataset",
    (tf.distribute.DistributedDataset,),
    {"__module__": tf.distribute.DistributedDataset.__module__},
)


class WorkerDataset(_KnownToKeras):
    """What one worker reads, as a distributed dataset.

    It is read by tf.data's own iterator. MultiDeviceIterator, which TensorFlow uses, crashes now
    and then when it is destroyed, and with several devices cannot be read within a loop.

    Args:
        dataset: The worker's share; with several devices its batches are PerReplica values.
        each: How many runs an iteration is for, of a dataset without end; each goes on where the
            last one ended. `None` if every iteration is a new one.
        builds: Whether Keras looks at a first batch to build the model, before it trains.
        on_iter: Called where an iteration begins.
        batches_per_epoch: How many batches Keras is to announce, if not as many as the user's
            dataset has.
        spec: What a batch of one replica is like, if batches are PerReplica values.
        parts: How many batches a run takes, as PerReplica values.
        size: Their size, where an element of the dataset has all of a run's.
        counts: Whether an iteration over a dataset without end has to end by itself.
        batches_per_run: How many of the user's batches make one of all workers.
    """

    def __init__(
        self,
        dataset: tf.data.Dataset,
        each: int | None,
        builds: bool,
        on_iter: Callable[[], None],
        batches_per_epoch: int | None = None,
        spec: Any = None,
        parts: int = 1,
        size: int | None = None,
        counts: bool = True,
        batches_per_run: int = 1,
    ) -> None:
        self.batches_per_epoch = batches_per_epoch
        self.batches_per_run = batches_per_run
        self._spec = spec
        self._dataset = dataset
        self._each = each
        self._builds = builds
        self._on_iter = on_iter
        self._parts = parts
        self._size = size
        self._counts = counts
        self._now: iterators.WorkerIterator | None = None

    def __iter__(self) -> Any:
        self._on_iter()
        if self._builds:
            self._builds = False
            spec = self._dataset.element_spec if self._spec is None else self._spec
            if _tells_shapes(spec):
                # Keras wants shapes and dtypes only. What a generator is made to yield here would
                # be missing in training, and not the same on every worker.
                return iter([spec])
            return iter(self._dataset)
        if self._each is None:
            found = iter(self._dataset)
            return found if self._parts == 1 else self._iterator(found)
        if self._now is None:
            self._now = self._iterator(iter(self._dataset))
        if self._counts:
            self._now = self._now.from_here(self._each)
        return self._now

    def _iterator(self, elements: tf.data.Iterator) -> iterators.WorkerIterator:
        return iterators.WorkerIterator(elements, None, self._parts, self._size)

    @property
    def element_spec(self) -> Any:
        """The specification of a batch."""
        return iterators.parted(self._dataset.element_spec, self._parts, self._size)

    def cardinality(self) -> tf.Tensor:
        """Returns how many batches there are."""
        if self.batches_per_epoch is not None:
            return tf.constant(self.batches_per_epoch, tf.int64)
        found = self._dataset.cardinality()
        each = self._parts if self._size is None else 1
        return found if each == 1 else tf.where(found > 0, found // each, found)

    def reduce(self, initial_state: Any, reduce_func: Callable) -> Any:
        """Reduces the dataset; a loop over it in a tf.function becomes this."""
        iterator = iter(self)

        def body(batch: Any, state: Any) -> tuple:
            state = reduce_func(state, batch.get_value())
            return iterator.get_next_as_optional(), state

        _, state = tf.while_loop(
            lambda batch, state: batch.has_value(),
            body,
            [iterator.get_next_as_optional(), initial_state],
            parallel_iterations=1,
        )
        return state


def _tells_shapes(spec: Any) -> bool:
    leaves = tf.nest.flatten(spec)
    return all(getattr(getattr(s, "shape", None), "rank", None) is not None for s in leaves)


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
        return dataset.map(as_it_is(lambda *batch: piece(_unstar(batch), worker, pieces)))
    return (
        dataset.enumerate()
        .map(as_it_is(lambda k, batch: (_first_piece(k, pieces, worker, num_workers), batch)))
        .filter(as_it_is(lambda index, batch: index < pieces))
        .map(as_it_is(lambda index, batch: piece(batch, index, pieces)))
    )


def _unstar(batch: tuple) -> Any:
    return batch[0] if len(batch) == 1 else batch


def _first_piece(k: tf.Tensor, pieces: int, worker: int, num_workers: int) -> tf.Tensor:
    """Returns which piece of batch k is this worker's; `pieces` or more if none is."""
    return tf.cast((worker - k * pieces) % num_workers, tf.int32)


def piece(batch: Any, index: Any, pieces: int) -> Any:
    """Returns one of N pieces of a nest of tensors with a common batch axis."""
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
