"""Model averaging: sums travel while learners compute (Crossbow's overlap)."""

from pathlib import Path

import pytest

from .harness import run_job

pytestmark = pytest.mark.timeout(200)


def test_a_slow_network_costs_no_time_where_computing_takes_longer(tmp_path: Path) -> None:
    # Some 120 ms for 800 kB there and back, and steps of 200 ms; both wait without a core.
    arguments = {"pause_seconds": 0.2, "gbps": 0.11}
    job = run_job("averaging_overlap.py", tmp_path, workers=2, arguments=arguments)
    for found in job.each():
        compute, exchange, both = (found[name] for name in ("compute", "exchange", "both"))
        assert compute > 0.2 and exchange > 0.1
        # One after the other would take all of both; half of the exchange is for a busy machine.
        assert both < compute + exchange / 2, found
