"""Values that are given to another worker: they are not copied, and yet they stay as they are."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist.strategies import variables as variables_lib


def by_optimizer(variable: tf.Variable) -> None:
    tf.raw_ops.ResourceApplyGradientDescent(
        var=variable.handle, alpha=tf.ones([], variable.dtype), delta=tf.ones_like(variable)
    )


def by_rows(variable: tf.Variable) -> None:
    variable.scatter_add(tf.IndexedSlices(tf.ones([1, 2], variable.dtype), [1]))


def by_assignment(variable: tf.Variable) -> None:
    variable.assign_add(tf.ones_like(variable))


@pytest.mark.parametrize("write", [by_optimizer, by_rows, by_assignment])
@pytest.mark.parametrize("dtype", [tf.float64, tf.float32, tf.float16, tf.bfloat16])
@pytest.mark.parametrize("in_graph", [False, True])
def test_what_was_read_stays_when_the_variable_is_written(
    write: Callable[[tf.Variable], None], dtype: tf.DType, in_graph: bool
) -> None:
    variable = tf.Variable(tf.zeros([3, 2], dtype))
    (before,) = variables_lib.read([variable])
    (tf.function(write) if in_graph else write)(variable)
    (after,) = variables_lib.read([variable])
    assert before.dtype == after.dtype == dtype.as_numpy_dtype
    assert np.all(np.asarray(before, np.float32) == 0)
    assert np.any(np.asarray(after, np.float32) != 0)


def test_a_keras_optimizer_does_not_write_what_was_read() -> None:
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(layer.trainable_variables)
    held = [v.value for v in (*layer.trainable_variables, *optimizer.variables)]
    before = variables_lib.read(held)
    copies = [np.array(v) for v in before]
    optimizer.apply([tf.ones(v.shape) for v in layer.trainable_variables])
    for value, copy in zip(before, copies, strict=True):
        np.testing.assert_array_equal(value, copy)
    after = variables_lib.read(held)
    assert not np.array_equal(before[0], after[0])


def test_nothing_is_copied() -> None:
    variable = tf.Variable(tf.zeros([1000]))
    one, other = variables_lib.read([variable, variable])
    assert np.shares_memory(one, other)
