"""What a worker's iterator over its input is to TensorFlow."""

from pathlib import Path

import pytest
import tensorflow as tf

from tf_syncdist.strategies import adapter
from tf_syncdist.strategies.iterators import WorkerIterator

pytestmark = pytest.mark.timeout(280)


def numbers(count: int, parts: int, runs: int | None = None) -> WorkerIterator:
    """Returns an iterator over 0, 1, 2, ..., with so many of them in an element."""
    elements = iter(tf.data.Dataset.range(count))
    length = None if runs is None else iter(tf.data.Dataset.range(runs))
    return WorkerIterator(elements, length, parts)


def values(element: object) -> list[int]:
    """Returns the parts of an element."""
    return [int(adapter.part_of(n, element)) for n in range(2)]


def test_it_reads_as_many_elements_as_it_has_parts_and_leaves_a_rest_out() -> None:
    assert [values(e) for e in numbers(7, 2)] == [[0, 1], [2, 3], [4, 5]]
    assert [values(e) for e in numbers(100, 2, runs=2)] == [[0, 1], [2, 3]]


def test_a_loop_in_a_function_ends() -> None:
    total = tf.Variable(0, dtype=tf.int64)

    @tf.function
    def run(iterator: WorkerIterator) -> None:
        for element in iterator:
            total.assign_add(adapter.part_of(0, element))
            total.assign_add(adapter.part_of(1, element))

    run(numbers(7, 2))
    assert int(total) == sum(range(6))
    run(numbers(100, 2, runs=4))
    assert int(total) == sum(range(6)) + sum(range(8))


def test_a_function_reads_for_many_learners() -> None:
    @tf.autograph.experimental.do_not_convert
    def read(iterator: WorkerIterator) -> tf.Tensor:
        element = iterator.get_next()
        return tf.add_n([adapter.part_of(n, element) for n in range(40)])

    function = tf.function(read)
    iterator = numbers(1000, 40)
    assert [int(function(iterator)) for _ in range(2)] == [sum(range(40)), sum(range(40, 80))]
    assert function.experimental_get_tracing_count() == 1


def test_parts_may_be_none() -> None:
    elements = iter(tf.data.Dataset.range(4).map(lambda n: (n, None)))
    iterator = WorkerIterator(elements, None, 2)

    @tf.function
    def read() -> tf.Tensor:
        return adapter.part_of(1, iterator.get_next())[0]

    assert [int(read()), int(read())] == [1, 3]


def test_a_stack_is_cut_into_its_parts() -> None:
    dataset = tf.data.Dataset.range(12).batch(6)
    found = list(WorkerIterator(iter(dataset), None, 2, size=3))
    parts = [[adapter.part_of(n, e).numpy().tolist() for n in range(2)] for e in found]
    assert parts == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_a_checkpoint_has_where_it_is(tmp_path: Path) -> None:
    iterator = numbers(20, 2)
    next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "there"))
    other = numbers(20, 2)
    tf.train.Checkpoint(iterator=other).read(path).assert_consumed()
    assert values(next(other)) == [2, 3]
