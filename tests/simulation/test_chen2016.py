"""Figures of the literature on backup workers, computed independently of this code.

They are those of the run-times that Chen et al. (arXiv 1604.00981) measured, of the law that is
calibrated to them. What is checked with many rounds is computed from the sorted times at once;
`test_jobs.py` shows that a simulated job gives exactly that.
"""

import numpy as np
import pytest

from tf_syncdist.cutoff import BackupWorkers
from tf_syncdist.cutoff.replay import static_throughputs
from tf_syncdist.simulation import bounds, laws
from tf_syncdist.simulation.jobs import simulate


@pytest.fixture(scope="module")
def seconds() -> np.ndarray:
    """Run-times of 100 workers."""
    return laws.Chen2016().sample(40_000, 100, np.random.default_rng(0))


def test_f1_when_the_kth_of_100_workers_is_in(seconds: np.ndarray) -> None:
    ordered = np.sort(seconds, axis=1)
    assert (ordered[:, 97] < 2).mean() == pytest.approx(0.88, abs=0.01)
    assert (ordered[:, 99] < 2).mean() == pytest.approx(0.29, abs=0.01)
    means = ordered.mean(axis=0)
    assert means[0] >= 1.30 and means[96] == pytest.approx(1.73, abs=0.005)
    assert means[97:] == pytest.approx([1.91, 2.51, 4.75], rel=0.01)


def test_f1_independent_workers_force_the_98th(seconds: np.ndarray) -> None:
    """P(98th of 100 < 2 s) follows from P(all < 2 s) = 0.30 alone: at most two of 100 are slow."""
    slow = 1 - 0.30**0.01
    draws = np.random.default_rng(1).binomial(100, slow, 200_000)
    assert (draws <= 2).mean() == pytest.approx(0.881, abs=0.003)
    share = (seconds < 2).mean()
    number = np.random.default_rng(2).binomial(100, 1 - share, 200_000)
    assert (number <= 2).mean() == pytest.approx((np.sort(seconds)[:, 97] < 2).mean(), abs=0.005)


def test_f2_the_best_number_of_contributions(seconds: np.ndarray) -> None:
    throughputs = static_throughputs(seconds)
    at = {94: 57.85, 95: 57.87, 96: 57.58, 90: 56.8, 98: 51.4, 99: 39.5, 100: 21.0}
    for count, throughput in at.items():
        assert throughputs[count - 1] == pytest.approx(throughput, rel=0.01)
    best = bounds.best_static(seconds)
    assert best.count in (94, 95, 96)
    assert best.throughput / throughputs[-1] == pytest.approx(2.75, abs=0.03)


@pytest.mark.parametrize(("gamma", "best"), [(1, 95), (0.95, 94), (0.85, 94), (0.7, 93), (0.5, 91)])
def test_f2_the_best_number_where_large_batches_gain_less(
    seconds: np.ndarray, gamma: float, best: int
) -> None:
    """Time to converge as N^-gamma x E[time of the Nth]; the optimum is flat."""
    counts = np.arange(1.0, 101)
    times = counts**-gamma * np.sort(seconds, axis=1).mean(axis=0)
    assert abs(int(np.argmin(times)) + 1 - best) <= 1
    assert times[best - 1] <= 1.0005 * times.min()
    assert times[95] <= 1.021 * times.min()


def test_f3_speed_up_per_machine_of_50_workers_and_backups() -> None:
    medians = []
    draws = laws.Chen2016().sample(40_000, 55, np.random.default_rng(3))
    for b in range(6):
        medians.append(np.median(np.sort(draws[:, : 50 + b], axis=1)[:, 49]))
    speed_ups = [medians[0] / medians[b] * 50 / (50 + b) for b in range(6)]
    assert speed_ups == pytest.approx([1.000, 1.085, 1.093, 1.090, 1.082, 1.072], abs=0.003)
    assert int(np.argmax(speed_ups)) in (2, 3)


@pytest.mark.parametrize("busy", [False, True])
def test_f7_every_contribution_is_accounted_for(busy: bool) -> None:
    seconds = laws.Chen2016().sample(300, 100, np.random.default_rng(4))
    outcome = simulate(seconds, BackupWorkers(4), late_workers_stay_busy=busy)
    assert (outcome.contributions == 96).all()
    assert outcome.contributed.sum() == 96 * 300
    assert outcome.dropped.sum() <= 4 * 300
    if not busy:
        # Who is slower than the 96th is dropped in that round, and begins the next with the others.
        slower = seconds > np.sort(seconds, axis=1)[:, 95:96]
        assert (outcome.dropped == slower.sum(axis=0)).all()
        assert outcome.dropped.sum() == 4 * 300
        assert not outcome.skipped.any()
        assert outcome.throughput == pytest.approx(57.58, rel=0.01)
    else:
        # It is dropped once for the round that it computed, and skips those that are over then.
        assert outcome.skipped.sum() > 100
        unfinished = 300 - outcome.contributed - outcome.dropped - outcome.skipped
        assert (unfinished >= 0).all()
        # Those that compute on when the job ends, each with the rounds since it began.
        assert np.count_nonzero(unfinished) <= 4


@pytest.mark.parametrize(
    ("name", "count", "gain"),
    [
        ("normal:0.1", 97, 0.028),
        ("lognormal:0.1", 96, 0.043),
        ("lognormal:0.3", 83, 0.34),
        ("exponential:0.1", 93, 0.12),
        ("pareto:3", 75, 1.95),
    ],
)
def test_other_tails_for_contrast(name: str, count: int, gain: float) -> None:
    seconds = laws.law(name).sample(20_000, 100, np.random.default_rng(5))
    throughputs = static_throughputs(seconds)
    best = bounds.best_static(seconds)
    # Around the optimum the curve is flat.
    assert abs(best.count - count) <= 1
    assert throughputs[count - 1] >= 0.999 * best.throughput
    assert best.throughput / throughputs[-1] - 1 == pytest.approx(gain, rel=0.05)
