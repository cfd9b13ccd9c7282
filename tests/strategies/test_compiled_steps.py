"""A single worker's steps may be compiled by XLA, under every strategy."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_syncdist

pytestmark = pytest.mark.timeout(280)


@pytest.mark.parametrize(
    "make",
    [
        tf_syncdist.SyncReplicasStrategy,
        tf_syncdist.ModelAveragingStrategy,
        tf_syncdist.ElasticAveragingStrategy,
    ],
)
def test_a_single_worker_trains_as_without_a_strategy(
    make: Callable[[], tf.distribute.Strategy],
) -> None:
    x = np.random.RandomState(0).randn(32, 4).astype("float32")

    def trained(strategy: tf.distribute.Strategy) -> list[np.ndarray]:
        with strategy.scope():
            keras.utils.set_random_seed(1)
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
            model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=True)
        model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0)
        return model.get_weights()

    strategy = make()
    expected = trained(tf.distribute.get_strategy())
    for value, wanted in zip(trained(strategy), expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6)
    assert strategy.local_report().rounds == 4
