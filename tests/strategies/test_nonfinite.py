"""What a worker does with values of its own that are not finite."""

import ml_dtypes
import numpy as np
import pytest

from tf_syncdist.errors import NonFiniteGradientError
from tf_syncdist.propagation.rows import Rows, unique
from tf_syncdist.propagation.slices import TensorSpec
from tf_syncdist.strategies import options
from tf_syncdist.strategies.nonfinite import Inspection, first_nonfinite, zeros

DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


def nameless(exchange: int, tensor: int) -> str:
    return ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_anywhere_is_found(dtype: type, bad: float) -> None:
    finite = np.ones((300, 500), dtype)
    assert first_nonfinite({0: finite, 1: np.zeros((), dtype), 2: finite}) is None
    for place in ((0, 0), (131, 36), (299, 499)):
        spoilt = finite.copy()
        spoilt[place] = bad
        assert first_nonfinite({0: finite, 1: spoilt, 2: spoilt}) == 1
    assert first_nonfinite({4: np.array(bad, dtype)}) == 4


def test_what_is_large_is_finite() -> None:
    largest = np.finfo(np.float32).max
    assert first_nonfinite({0: np.full(10, largest, np.float32)}) is None


def test_integers_and_nothing_are_finite() -> None:
    assert first_nonfinite({0: np.array([-1, 2**62]), 1: np.empty((0, 3), np.float32)}) is None
    assert first_nonfinite({}) is None


def test_views_are_looked_at_as_they_are() -> None:
    whole = np.ones((10, 10), np.float32)
    whole[:, 3] = np.nan
    assert first_nonfinite({0: whole[:, :3]}) is None
    assert first_nonfinite({0: whole[:, ::3]}) == 0


def test_rows_of_a_table_are_looked_at() -> None:
    values = np.ones((2, 3), np.float32)
    indices = np.array([5, 1])
    assert first_nonfinite({0: Rows(indices, values)}) is None
    values[1, 2] = np.inf
    assert first_nonfinite({0: Rows(indices, values)}) == 0


def test_the_default_looks_at_nothing() -> None:
    inspection = Inspection("pass", 0)
    assert not inspection.looks
    assert not inspection.rejects(0, 0, {0: np.array([np.nan])}, nameless)
    assert inspection.rounds == 0


def test_rounds_are_counted_once() -> None:
    inspection = Inspection("drop", 0)
    bad, good = {0: np.array([np.nan])}, {0: np.array([1.0])}
    for run, (first, second) in enumerate([(bad, bad), (good, good), (good, bad)]):
        inspection.begin_run()
        assert inspection.rejects(run, 0, first, nameless) is (first is bad)
        assert inspection.rejects(run, 1, second, nameless) is (second is bad)
        assert inspection.found is (run != 1)
    assert inspection.rounds == 2


@pytest.mark.parametrize("name, expected", [("dense/bias", ", that of 'dense/bias',"), ("", "")])
def test_an_error_says_where_it_was(name: str, expected: str) -> None:
    inspection = Inspection("error", 3)
    inspection.begin_run()
    tensors = {0: np.ones(2), 1: np.array([np.inf])}
    where = rf"tensor 1{expected} of exchange 2 in run 7 on worker 3\."
    with pytest.raises(NonFiniteGradientError, match=where):
        inspection.rejects(7, 2, tensors, lambda exchange, tensor: name)
    assert inspection.rounds == 1


@pytest.mark.parametrize("name", ["", "skip", None, True])
def test_an_unknown_policy_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"must be one of \('pass', 'drop', 'error'\)"):
        options.check_nonfinite(name)


def test_zeros_have_the_form_of_what_they_stand_for() -> None:
    specs = [TensorSpec("float32", (2, 3)), TensorSpec("float64", (9, 2, 2), by_rows=True)]
    dense, table = zeros(specs)
    assert dense.shape == (2, 3) and dense.dtype == np.float32 and not dense.any()
    assert table.values.shape == (0, 4) and table.values.dtype == np.float64
    assert unique(table).indices.size == 0
