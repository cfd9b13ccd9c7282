"""TensorFlow's own tests of strategies, for MirroredStrategy and for one worker of ours.

They are the checks in the bases of tensorflow/python/distribute/strategy_test_lib.py. A check
that MirroredStrategy passes on the same devices has to pass for ours. Not here, since
MirroredStrategy does not pass it or cannot do it either:

* numpy_dataset: only for strategies of TensorFlow 1.
* device_and_input_device_are_colocated, ..._with_function: start a cluster of TensorFlow servers,
  for which TensorFlow does not install what it needs (portpicker).
* all_reduce_..._gradients without a graph or a tf.function: use tf.gradients, which needs one.
* datasets_from_function in a graph: iterates in the way of TensorFlow 1.
* The checks with "function" on one device: their base for one device knows none.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from .device_counts import run_program

pytestmark = pytest.mark.timeout(280)

_BOTH = ("eager", "graph")
# The modes of the checks, as `programs/tensorflow_checks.py` explains them.
_CHECKS = {
    "minimize_loss_eager": ("eager",),
    "minimize_loss_graph": ("eager",),  # makes a graph by itself
    "summary_for_replica_zero_only": _BOTH,
    "replica_id": _BOTH,
    "call_and_merge_exceptions": _BOTH,
    "datasets_from_function": ("eager",),
    "iterator_from_function": _BOTH,
    "global_step_update": _BOTH,
    "trainable_variable": _BOTH,
    "run": _BOTH,
    "all_reduce_sum": _BOTH,
    "all_reduce_sum_gradients": ("graph",),
    "all_reduce_sum_gradient_tape": _BOTH,
    "all_reduce_mean": _BOTH,
    "all_reduce_mean_gradients": ("graph",),
    "all_reduce_mean_gradient_tape": _BOTH,
}
_IN_FUNCTION = ["run", *(name for name in _CHECKS if name.startswith("all_reduce"))]


def _checks(devices: int) -> list[tuple[str, str]]:
    checks = [(name, mode) for name, modes in _CHECKS.items() for mode in modes]
    return checks + [(name, "function") for name in _IN_FUNCTION if devices > 1]


def _run(devices: int, factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    directory = factory.mktemp(f"devices_{devices}")
    return run_program("tensorflow_checks.py", directory, devices=devices, checks=_checks(devices))


@pytest.fixture(scope="module")
def outcomes_1(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Returns what became of all checks on one device."""
    return _run(1, tmp_path_factory)


@pytest.fixture(scope="module")
def outcomes_2(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Returns what became of all checks on two devices."""
    return _run(2, tmp_path_factory)


@pytest.mark.parametrize("strategy", ["mirrored", "ours"])
@pytest.mark.parametrize(
    ("devices", "name", "mode"),
    [(devices, *check) for devices in (1, 2) for check in _checks(devices)],
)
def test_a_check_of_tensorflow_passes(
    request: pytest.FixtureRequest, devices: int, name: str, mode: str, strategy: str
) -> None:
    outcomes = request.getfixturevalue(f"outcomes_{devices}")
    outcome = outcomes[f"{name}-{mode}"][strategy]
    assert outcome["outcome"] == "passed", outcome["text"]
