"""What is chosen from what the first rounds have cost."""

import pytest

from tf_syncdist.propagation.choice import Measured, choose


@pytest.mark.parametrize(
    "compute, exposed, slices, expected",
    [
        # A thin network: waiting for gradients takes as long as the next forward pass.
        (0.6, 0.4, 80, True),
        # A fast network: there is next to nothing to hide.
        (0.6, 0.01, 80, False),
        # So many slices would cost more than they could hide.
        (0.6, 0.1, 500, False),
        # A small model on any network: its rounds are shorter than what could be gained.
        (0.001, 0.006, 1, False),
        (0.0, 0.0, 1, False),
    ],
)
def test_what_can_be_hidden_decides(
    compute: float, exposed: float, slices: int, expected: bool
) -> None:
    choice = choose([Measured(compute, exposed)], slices)
    assert choice.by_priority is expected
    assert f"{exposed:.3f} s" in choice.reason and f"{slices} slices" in choice.reason


def test_waiting_for_a_slower_worker_is_not_taken_for_the_network() -> None:
    fast, slow = Measured(0.6, 0.41), Measured(1.0, 0.01)
    assert not choose([fast, slow], 80).by_priority
    assert choose([fast], 80).by_priority


def test_without_figures_nothing_changes() -> None:
    assert not choose([], 10).by_priority
