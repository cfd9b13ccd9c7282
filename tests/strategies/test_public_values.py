"""One worker of ours answers as MirroredStrategy does on the same devices.

The questions are in `programs/public_values.py` and `programs/public_state.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

import tf_syncdist

from .device_counts import run_program

pytestmark = pytest.mark.timeout(280)

Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]

# What MirroredStrategy refuses.
_ERRORS = {("public_values", 2): {"numbers_that_are_not_distributed"}}


def _answers(program: str, devices: int) -> Callable:
    @pytest.fixture(scope="module", name=f"{program}_{devices}")
    def run(tmp_path_factory: pytest.TempPathFactory) -> Answers:
        return run_program(f"{program}.py", tmp_path_factory.mktemp(program), devices=devices)

    return run


values_1, values_2 = _answers("public_values", 1), _answers("public_values", 2)
state_1, state_2 = _answers("public_state", 1), _answers("public_state", 2)


def _difference(answers: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns in words how our answer differs from MirroredStrategy's; empty if it does not."""
    mirrored, ours = (
        {k: v for k, v in answers[name].items() if k != "traceback"}
        for name in ("mirrored", "ours")
    )
    if mirrored == ours:
        return ""
    return f"mirrored {mirrored}, ours {ours}\n{answers['ours'].get('traceback', '')}"


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("program", ["public_values", "public_state"])
def test_the_answers_are_those_of_mirrored_strategy(
    request: pytest.FixtureRequest, program: str, devices: int
) -> None:
    answers: Answers = request.getfixturevalue(f"{program}_{devices}")
    differences = {n: _difference(a) for n, a in answers.items()}
    assert {n: d for n, d in differences.items() if d} == {}
    # Equal errors are equal answers, but not by mistake.
    errors = {n for n, a in answers.items() if "error" in a["mirrored"]}
    assert errors == _ERRORS.get((program, devices), set())


def test_a_worker_alone_is_the_chief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    strategy = tf_syncdist.SyncReplicasStrategy()
    assert strategy.is_chief
    assert (strategy.worker_index, strategy.num_workers) == (0, 1)
    assert strategy.cluster_resolver is None
