"""Sums of contributions and their scale."""

import numpy as np
import pytest

from tf_syncdist.aggregation import sums
from tf_syncdist.proto import tf_syncdist_pb2 as pb

DTYPES = ["<f4", "<f8", "<i4", "<i8"]


def test_every_dtype_of_the_contract_can_be_summed() -> None:
    assert set(sums.DTYPES) == set(pb.DataType.values()) - {pb.DATA_TYPE_UNSPECIFIED}
    assert [sums.DTYPES[n].str for n in (pb.FLOAT32, pb.FLOAT64, pb.INT32, pb.INT64)] == DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_contribution_is_copied_and_no_contribution_is_changed(dtype: str) -> None:
    messages = [np.arange(i, i + 5).astype(dtype).tobytes() for i in range(3)]
    before = [bytes(m) for m in messages]
    total = None
    for message in messages:
        total = sums.add(total, np.frombuffer(message, dtype))
    assert total.dtype == np.dtype(dtype)
    assert total.tolist() == [3, 6, 9, 12, 15]
    assert messages == before


def test_the_sum_is_made_in_place() -> None:
    total = sums.add(None, np.ones(4, "<f4"))
    assert sums.add(total, np.ones(4, "<f4")) is total


def test_values_at_any_address_can_be_summed() -> None:
    """A payload lies wherever its header ends, so its numbers are seldom aligned."""
    data = b"\0" + np.arange(4, dtype="<f8").tobytes()
    values = np.frombuffer(memoryview(data)[1:], "<f8")
    assert sums.add(sums.add(None, values), values).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_n_contributions_are_the_sum_bit_for_bit(dtype: str, n: int) -> None:
    largest = np.iinfo(dtype).max if "i" in dtype else np.finfo(dtype).max
    total = np.array([1, largest, -3], dtype)
    before = total.tobytes()
    assert sums.scale(total, n, n).tobytes() == before


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("contributions", [1, 2, 4])
def test_fewer_contributions_give_the_mean_times_n(dtype: str, contributions: int) -> None:
    values = np.random.default_rng(0).normal(size=(contributions, 100)).astype(dtype)
    total = None
    for row in values:
        total = sums.add(total, row)
    result = sums.scale(total, contributions, 5)
    assert result.dtype == np.dtype(dtype)
    expected = values.astype("f8").mean(0) * 5
    tolerance = 1e-6 if dtype == "<f4" else 1e-14
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_means_of_integers_are_rounded_to_integers(dtype: str) -> None:
    result = sums.scale(np.array([0, 2, 5, -5, 300], dtype), 2, 3)
    assert result.dtype == np.dtype(dtype)
    assert result.tolist() == [0, 3, 8, -8, 450]


def test_infinities_and_nans_pass_through_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    big = np.array([3e38, np.inf, np.nan, 1.0], "<f4")
    total = sums.add(sums.add(None, big), np.array([3e38, -np.inf, 1.0, 1.0], "<f4"))
    result = sums.scale(total, 2, 3)
    assert np.isposinf(result[0]) and np.isnan(result[1:3]).all() and result[3] == 3
    assert np.isposinf(sums.scale(np.array([3e38], "<f4"), 1, 2)[0])
    assert not recwarn.list
