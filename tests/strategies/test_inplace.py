"""The central model moves in place as the pure rule says, and graphs know of it."""

import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist.mixing.averaging import Central, moved
from tf_syncdist.strategies import inplace

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_it_is_the_pure_rule(dtype: str) -> None:
    random = np.random.default_rng(0)
    model, last, corrections = random.normal(size=(3, 5)).astype(dtype)
    variable, last_variable = tf.Variable(model), tf.Variable(last)

    @tf.function
    def update() -> None:
        inplace.move(variable, last_variable, tf.constant(corrections), 0.5)

    graph = update.get_concrete_function().graph
    # Otherwise a worker that joins would not take it over.
    assert any(v is last_variable for v in graph.variables)
    update()
    expected = moved(Central(model, last), corrections, 0.5)
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(variable.numpy(), expected.model, tolerance, tolerance)
    np.testing.assert_allclose(last_variable.numpy(), expected.move, tolerance, tolerance)
