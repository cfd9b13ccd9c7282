"""Which variable is the first that differs between workers."""

import pytest

from tf_syncdist.aggregation.manifests import Variable, first_difference

KERNEL = Variable("dense/kernel", "float32", (3, 2))
BIAS = Variable("dense/bias", "float32", (2,))
MODEL = [KERNEL, BIAS]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_equal_manifests_have_no_difference(workers: int) -> None:
    assert first_difference({w: list(MODEL) for w in range(workers)}) == ""


@pytest.mark.parametrize("variables", [[], [Variable("step", "int64", ())]])
def test_manifests_without_variables_or_with_scalars_can_agree(variables: list[Variable]) -> None:
    assert first_difference({0: variables, 1: list(variables)}) == ""


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("name", "dense_1/bias", "dense_1/bias (float32, shape [2])"),
        ("dtype", "float64", "dense/bias (float64, shape [2])"),
        ("shape", (1, 2), "dense/bias (float32, shape [1, 2])"),
        ("shape", (), "dense/bias (float32, shape [])"),
    ],
)
def test_name_dtype_and_shape_count(field: str, value: object, named: str) -> None:
    other = [KERNEL, BIAS._replace(**{field: value})]
    text = first_difference({0: MODEL, 1: MODEL, 2: other})
    assert f"variable 1 is dense/bias (float32, shape [2]) on worker 0 and {named} on worker 2" in (
        text
    )
    assert "worker 1" not in text


def test_the_order_of_variables_counts() -> None:
    text = first_difference({0: MODEL, 1: MODEL[::-1]})
    assert "variable 0 is dense/kernel" in text and "dense/bias" in text


@pytest.mark.parametrize("longer, shorter", [(0, 1), (1, 0)])
def test_a_variable_that_one_worker_lacks_is_named(longer: int, shorter: int) -> None:
    text = first_difference({longer: MODEL, shorter: MODEL[:1]})
    assert f"{2 - longer} variable(s) on worker 0 and {1 + longer} on worker 1" in text
    assert f"dense/bias (float32, shape [2]), which only worker {longer} has" in text


def test_the_first_difference_of_the_first_worker_is_told() -> None:
    other = [KERNEL._replace(name="a"), BIAS._replace(name="b")]
    text = first_difference({2: MODEL[:1], 1: other, 0: MODEL})
    assert "variable 0 is" in text and "a (float32" in text
    assert "b (float32" not in text and "worker 2" not in text
