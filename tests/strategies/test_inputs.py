"""How a dataset is divided among workers."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist.strategies import inputs


def _batches(count: int, size: int, last: int = 0) -> tf.data.Dataset:
    examples = np.arange(count * size + last)
    return tf.data.Dataset.from_tensor_slices({"a": examples, "b": [examples, -examples][0]}).batch(
        size
    )


def _shares(dataset: tf.data.Dataset, pieces: int, workers: int) -> list[list[list[int]]]:
    return [
        [batch["a"].numpy().tolist() for batch in inputs.divide(dataset, pieces, w, workers)]
        for w in range(workers)
    ]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_without_backup_workers_every_round_has_exactly_the_users_batch(workers: int) -> None:
    dataset = _batches(5, 12, last=7)
    shares = _shares(dataset, workers, workers)
    whole = [batch["a"].numpy().tolist() for batch in dataset]
    assert [sum(pieces, []) for pieces in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize(("pieces", "workers"), [(1, 2), (2, 3), (2, 4), (3, 4), (1, 4)])
def test_backup_workers_get_as_many_batches_and_no_piece_twice(pieces: int, workers: int) -> None:
    rounds = 6
    shares = _shares(_batches(rounds, 12), pieces, workers)
    assert [len(share) for share in shares] == [rounds] * workers
    assert {len(batch) for share in shares for batch in share} == {12 // pieces}
    # The pieces of the repeated data are dealt out in turn: none is left out, none is given twice.
    dealt = list(itertools.chain(*itertools.chain(*zip(*shares, strict=True))))
    repeated = list(range(rounds * 12)) * -(-workers // pieces)
    assert sorted(dealt) == sorted(repeated[: rounds * workers * 12 // pieces])


@pytest.mark.parametrize(("pieces", "workers"), [(2, 2), (2, 3)])
def test_an_endless_dataset_stays_endless(pieces: int, workers: int) -> None:
    share = inputs.divide(_batches(2, 4).repeat(), pieces, 0, workers)
    assert share.cardinality() == tf.data.INFINITE_CARDINALITY or workers > pieces
    assert len(list(share.take(50))) == 50


def test_every_worker_gets_a_piece_of_every_batch_of_a_dataset_of_unknown_length() -> None:
    dataset = _batches(5, 4).filter(lambda batch: True)
    shares = _shares(dataset, 2, 3)
    assert [len(share) for share in shares] == [5, 5, 5]
    for pieces, batch in zip(zip(*shares, strict=True), dataset, strict=True):
        assert set(sum(pieces, [])) == set(batch["a"].numpy().tolist())


def test_nobody_is_left_without_examples_by_a_small_last_batch() -> None:
    shares = _shares(_batches(1, 8, last=1), 4, 4)
    assert [share[1] for share in shares] == [[8]] * 4


def test_sparse_and_ragged_batches_are_cut_like_dense_ones() -> None:
    ragged = tf.ragged.constant([[1], [2, 2], [], [4]])
    sparse = tf.sparse.from_dense([[1, 0], [0, 2], [3, 0], [0, 4]])
    dataset = tf.data.Dataset.from_tensors((ragged, sparse, tf.range(4)))
    (share,) = inputs.divide(dataset, 2, 1, 2)
    assert share[0].to_list() == [[], [4]]
    assert tf.sparse.to_dense(share[1]).numpy().tolist() == [[3, 0], [0, 4]]
    assert share[2].numpy().tolist() == [2, 3]


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_a_batch_that_cannot_be_divided_is_refused(drop_remainder: bool) -> None:
    dataset = tf.data.Dataset.range(20).batch(5, drop_remainder=drop_remainder)
    with pytest.raises(ValueError, match=r"batch_size=5 with N=2.*Use 4 or 6"):
        inputs.divide(dataset, 2, 0, 2)
