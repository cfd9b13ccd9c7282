"""Which worker is given which examples."""

from pathlib import Path

import pytest

from .harness import run_job

pytestmark = pytest.mark.timeout(260)

EXAMPLES = list(range(50))
BATCHES = 7


def _epochs(rounds: list[list[list[int]]], steps: int) -> list[list[list[int]]]:
    """Joins what the workers were given in a round, and groups the rounds by epochs."""
    batches = [sum(pieces, []) for pieces in zip(*rounds, strict=True)]
    return [batches[i : i + steps] for i in range(0, len(batches), steps)]


def test_two_workers_share_every_batch(tmp_path: Path) -> None:
    job = run_job("inputs.py", tmp_path, workers=2)

    for name in ("arrays", "dataset"):
        first, second = _epochs(job.each(name), BATCHES)
        for epoch in (first, second):
            # One pass over the data: every example once, in batches of the user's size.
            assert [len(batch) for batch in epoch] == [8] * 6 + [2]
            assert sorted(sum(epoch, [])) == EXAMPLES
        assert first != second, f"{name}: the same order in both epochs"
    (epoch,) = _epochs(job.each("in_order"), BATCHES)
    assert sum(epoch, []) == EXAMPLES
    endless = _epochs(job.each("endless"), 5)
    assert sum(sum(endless, []), []) == (EXAMPLES * 2)[:80]
    (epoch,) = _epochs(job.each("unknown"), 5)
    assert sum(epoch, []) == EXAMPLES[:37]
    # A batch of fewer examples than its share would be: nobody is left without any.
    assert job.each("tiny") == [[[0, 1]], [[2]]]
    assert job.common("rounds") == 2 * BATCHES + BATCHES + 2 * BATCHES + 10 + 5 + 1
