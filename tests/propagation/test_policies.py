"""The objects by which a user says how gradients travel."""

import dataclasses
import json

import pytest

from tf_syncdist.propagation import (
    FifoPropagation,
    PriorityPropagation,
    Propagation,
    serialize,
)
from tf_syncdist.propagation.policies import MAX_CREDIT_BYTES, MAX_SLICE_ELEMENTS, cutter
from tf_syncdist.propagation.slices import TensorSpec, plan, plan_by_priority

ALL: list[Propagation] = [
    FifoPropagation(),
    FifoPropagation(overlap=False),
    FifoPropagation(slice_elements=7),
    PriorityPropagation(),
    PriorityPropagation(slice_elements=1, credit_bytes=1),
    PriorityPropagation(MAX_SLICE_ELEMENTS, MAX_CREDIT_BYTES),
]
NO_SIZES = [0, -1, True, False, 1.0, 50_000.0, "50000", float("nan")]


@pytest.mark.parametrize("value", [*NO_SIZES, None, MAX_SLICE_ELEMENTS + 1])
def test_slices_have_a_number_of_elements(value: object) -> None:
    with pytest.raises(ValueError, match="`slice_elements` must be an int from 1 to") as error:
        PriorityPropagation(slice_elements=value)
    assert f"slice_elements={value!r}" in str(error.value)
    if value is not None:
        with pytest.raises(ValueError, match="`slice_elements` must be"):
            FifoPropagation(slice_elements=value)


@pytest.mark.parametrize("value", [*NO_SIZES, None, MAX_CREDIT_BYTES + 1])
def test_the_credit_is_a_number_of_bytes(value: object) -> None:
    with pytest.raises(ValueError, match="`credit_bytes` must be an int from 1 to") as error:
        PriorityPropagation(credit_bytes=value)
    assert f"credit_bytes={value!r}" in str(error.value)


@pytest.mark.parametrize("propagation", ALL, ids=repr)
def test_a_config_makes_it_anew(propagation: Propagation) -> None:
    config = propagation.get_config()
    assert type(propagation)(**config) == propagation
    assert json.loads(json.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        propagation.slice_elements = 3


def test_text_is_equal_exactly_for_equal_objects() -> None:
    texts = [serialize(p) for p in ALL]
    assert len(set(texts)) == len(ALL)
    assert texts == [serialize(type(p)(**p.get_config())) for p in ALL]
    # Workers of different versions compare it.
    assert serialize(PriorityPropagation(7, 8)) == (
        '{"class_name": "PriorityPropagation", "config": {"credit_bytes": 8, "slice_elements": 7}}'
    )


def test_each_cuts_in_its_own_way() -> None:
    specs = [TensorSpec("float32", (n,)) for n in (100, 5, 60)]
    fused = cutter(FifoPropagation(), 80, 2, 3)
    assert fused(specs, None) == fused(specs, [2, 1, 0]) == plan(specs, 80, 2, 3)
    for propagation in (FifoPropagation(slice_elements=40), PriorityPropagation(40)):
        cut = cutter(propagation, 80, 2, 3)
        assert cut(specs, [2, 1, 0]) == plan_by_priority(specs, [2, 1, 0], 40, 2)
        # Where nobody knows when they are used, their own order stands for it.
        assert cut(specs, None) == plan_by_priority(specs, [0, 1, 2], 40, 2)
