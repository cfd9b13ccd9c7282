"""A worker that comes to a fit in progress begins with its epoch, and that fit only."""

import keras
import numpy as np
import pytest

from tf_syncdist.strategies.keras_calls import FitCallback


@pytest.mark.parametrize("begin, expected", [(2, [2, 3]), (99, []), (None, [0, 1, 2, 3])])
def test_later_fits_begin_as_they_are_told(begin: int | None, expected: list[int]) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.zeros((4, 2), "f4")
    for first, epochs in ((begin, expected), (None, [0, 1, 2, 3])):
        seen: list[int] = []
        callback = FitCallback(lambda first=first: first, seen.append, lambda: None)
        model.fit(x, x[:, :1], epochs=4, verbose=0, callbacks=[callback])
        assert seen == epochs
