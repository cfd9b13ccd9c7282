"""Sums of contributions and their scale."""

from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf

from tf_syncdist.aggregation import sums
from tf_syncdist.proto import tf_syncdist_pb2 as pb

DTYPES = ["<f4", "<f8", "<i4", "<i8"]
NARROW = {pb.FLOAT16: tf.float16, pb.BFLOAT16: tf.bfloat16}


def summed(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Adds rows as the service does, which uses the first one where it is."""
    total = np.empty_like(rows[0])
    first, *others = rows
    if not others:
        total[...] = first
    for row in others:
        sums.add(total, first, row)
        first = None
    return total


def test_every_dtype_of_the_contract_can_be_summed() -> None:
    assert set(sums.DTYPES) == set(pb.DataType.values()) - {pb.DATA_TYPE_UNSPECIFIED}
    for number, name in zip((pb.FLOAT32, pb.FLOAT64, pb.INT32, pb.INT64), DTYPES, strict=True):
        assert sums.DTYPES[number] == (np.dtype(name), np.dtype(name))
    for number in NARROW:
        on_wire, in_sums = sums.DTYPES[number]
        assert (on_wire.itemsize, in_sums) == (2, np.dtype("<f4"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contributions_are_added_and_none_is_changed(dtype: str) -> None:
    messages = [np.arange(i, i + 5).astype(dtype).tobytes() for i in range(3)]
    before = [bytes(m) for m in messages]
    total = summed([np.frombuffer(message, dtype) for message in messages])
    assert total.dtype == np.dtype(dtype)
    assert total.tolist() == [3, 6, 9, 12, 15]
    assert messages == before


def test_values_at_any_address_can_be_summed() -> None:
    """A payload lies wherever its header ends; other clients need not align theirs."""
    data = b"\0" + np.arange(4, dtype="<f8").tobytes()
    values = np.frombuffer(memoryview(data)[1:], "<f8")
    total = np.ones(4)
    sums.add(total, None, values)
    sums.add(total, None, values)
    assert total.tolist() == [1, 3, 5, 7]


def hard_floats() -> np.ndarray:
    """All exponents, ties of both narrow types and their neighbours, and what is no number."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    halves = (bits & 0xFFFFE000) | 0x1000
    some = np.concatenate([bits, ties, ties + 1, ties - 1, halves, halves + 1, halves - 1])
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], "<f4")
    return np.concatenate([some.view("<f4"), special])


@pytest.mark.parametrize("dtype", NARROW)
def test_narrowing_rounds_as_tensorflow_does(dtype: int) -> None:
    values = hard_floats()
    out = np.empty(values.size, sums.DTYPES[dtype][0])
    sums.narrow(values, dtype, out)
    expected = tf.cast(values, NARROW[dtype])
    received = tf.bitcast(out.view("<u2"), NARROW[dtype])
    same = (expected == received) | (tf.math.is_nan(expected) & tf.math.is_nan(received))
    assert bool(tf.reduce_all(same))


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_values_are_widened_without_a_change(dtype: int) -> None:
    narrow = tf.cast(hard_floats(), NARROW[dtype])
    widened = sums.widen(tf.bitcast(narrow, tf.uint16).numpy().view(sums.DTYPES[dtype][0]), dtype)
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, tf.cast(narrow, tf.float32).numpy())


@pytest.mark.parametrize(("dtype", "bits"), [(pb.FLOAT16, 11), (pb.BFLOAT16, 8)])
def test_the_error_of_a_compressed_sum_is_bounded(dtype: int, bits: int) -> None:
    """Every contribution and the sum are rounded once, to so many significant bits."""
    exact = np.random.default_rng(1).normal(size=(4, 10_000)).astype("<f4")
    on_wire, _ = sums.DTYPES[dtype]
    sent = np.empty(exact.shape, on_wire)
    for row, out in zip(exact, sent, strict=True):
        sums.narrow(row, dtype, out)
    total = summed([sums.widen(row, dtype) for row in sent])
    received = np.empty(total.size, on_wire)
    sums.narrow(total, dtype, received)
    error = np.abs(sums.widen(received, dtype) - exact.sum(0, dtype="f8"))
    half = 2.0**-bits
    bound = half * (np.abs(exact).sum(0) * (1 + half) + np.abs(total)) + 1e-6
    assert np.all(error <= bound)
    assert error.max() > half * 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_n_contributions_are_the_sum_bit_for_bit(dtype: str, n: int) -> None:
    largest = np.iinfo(dtype).max if "i" in dtype else np.finfo(dtype).max
    total = np.array([1, largest, -3], dtype)
    before = total.tobytes()
    sums.scale(total, n, n)
    assert total.tobytes() == before


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("contributions", [1, 2, 4])
def test_fewer_contributions_give_the_mean_times_n(dtype: str, contributions: int) -> None:
    values = np.random.default_rng(0).normal(size=(contributions, 100)).astype(dtype)
    result = summed(list(values))
    sums.scale(result, contributions, 5)
    assert result.dtype == np.dtype(dtype)
    expected = values.astype("f8").mean(0) * 5
    tolerance = 1e-6 if dtype == "<f4" else 1e-14
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_means_of_integers_are_rounded_to_integers(dtype: str) -> None:
    result = np.array([0, 2, 5, -5, 300], dtype)
    sums.scale(result, 2, 3)
    assert result.dtype == np.dtype(dtype)
    assert result.tolist() == [0, 3, 8, -8, 450]


def test_infinities_and_nans_pass_through_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    big = np.array([3e38, np.inf, np.nan, 1.0], "<f4")
    result = summed([big, np.array([3e38, -np.inf, 1.0, 1.0], "<f4")])
    sums.scale(result, 2, 3)
    assert np.isposinf(result[0]) and np.isnan(result[1:3]).all() and result[3] == 3
    result = np.array([3e38], "<f4")
    sums.scale(result, 1, 2)
    assert np.isposinf(result[0])
    assert not recwarn.list
