"""Divides training input among learners.

Batches stay as large as the user has made them: each goes to one learner. They are dealt out to
workers in turn, and a run takes one for each learner of a worker. So an epoch of B batches has
B / k runs with k learners in all, rounded up: the learners that have no batch of it left in its
last run go on with the next pass over the data. Where batches are put one behind the other to be
read at once, a last one that is not full is filled up from the next pass, too.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from tf_syncdist.strategies import adapter, inputs


class Share(NamedTuple):
    """What one worker reads.

    Args:
        dataset: The batches of its learners, one after the other.
        size: Where an element has the batches of all learners, one behind the other: their size.
        spec: What a learner's batch is like.
        runs: How many runs an epoch has; `None` if nobody knows.
        ends: Whether the dataset comes to an end, so that workers have to agree on where.
        batches_per_run: How many of the dataset's batches a run of all workers takes.
    """

    dataset: tf.data.Dataset
    size: int | None
    spec: Any
    runs: int | None
    ends: bool
    batches_per_run: int


def share(
    dataset: tf.data.Dataset,
    learners: int,
    worker: int,
    num_workers: int,
    batches: int | None = None,
    batch_size: int | None = None,
) -> Share:
    """Returns one worker's share of a batched dataset.

    The auto-shard option of the dataset is honoured: by default and with DATA its batches are dealt
    out, with FILE or HINT TensorFlow gives each worker its files, and with OFF the dataset is this
    worker's own.

    Args:
        dataset: The whole dataset; every worker must see it in the same order.
        learners: How many learners this worker has.
        worker: Index of this worker.
        num_workers: How many workers there are.
        batches: How many batches it has, if it does not tell.
        batch_size: Their size, if it does not tell.
    """
    count = int(dataset.cardinality()) if batches is None else batches
    sharers = num_workers
    policy = dataset.options().experimental_distribute.auto_shard_policy
    if batch_size is None:
        batch_size = adapter.static_batch_size(dataset) if learners > 1 else None
    repeats = count >= 0
    if policy is tf.data.experimental.AutoShardPolicy.OFF:
        sharers = 1
    elif inputs.is_sharded_by_user(dataset):
        dataset = adapter.shard_by_files(dataset, num_workers, worker)
    elif num_workers > 1:
        # Where it is repeated first, a batch that one worker has more goes to each of them in turn.
        dataset = (dataset.repeat() if repeats else dataset).shard(num_workers, worker)
        repeats = False
    if repeats:
        dataset = dataset.repeat()
    runs = -(-count // (sharers * learners)) if count >= 0 else None
    ends = count == tf.data.UNKNOWN_CARDINALITY
    spec, size = dataset.element_spec, None
    if learners > 1 and batch_size is not None and not ends and stacks(spec, batch_size):
        # One element for each run is read sooner than one for each learner.
        size = batch_size
        dataset = dataset.rebatch(learners * size, drop_remainder=True)
    ahead = 2 if size is not None else 2 * learners
    return Share(dataset.prefetch(ahead), size, spec, runs, ends, sharers * learners)


def stacks(spec: Any, size: int) -> bool:
    """Returns whether batches of this size can be put one behind the other.

    Args:
        spec: What a batch is like.
        size: How many examples it has.
    """
    return all(
        isinstance(s, tf.TensorSpec)
        and s.shape.rank
        and s.shape[0] in (None, size)
        and s.shape[1:].is_fully_defined()
        for s in tf.nest.flatten(spec)
    )
