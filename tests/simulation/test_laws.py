"""Laws of run-times and the names that command lines use."""

import numpy as np
import pytest

from tf_syncdist.cutoff import BackupWorkers, Deadline, Elfving, FullSync, OrderStatistics
from tf_syncdist.simulation import bounds, laws, names

TEXTS = [
    "chen2016",
    "normal",
    "normal:0.3",
    "lognormal:0.3",
    "exponential",
    "pareto:1.5",
    "regime_switching:1.6",
]


@pytest.mark.parametrize("text", TEXTS)
def test_laws_give_positive_times_that_a_seed_repeats(text: str) -> None:
    law = laws.law(text)
    seconds = law.sample(200, 7, np.random.default_rng(1))
    assert seconds.shape == (200, 7) and seconds.dtype == np.float64
    assert (seconds > 0).all() and np.isfinite(seconds).all()
    assert (seconds == law.sample(200, 7, np.random.default_rng(1))).all()
    assert (seconds != law.sample(200, 7, np.random.default_rng(2))).any()


def test_every_named_law_can_be_had() -> None:
    assert {text.partition(":")[0] for text in TEXTS} == set(laws.NAMES)


def test_nodes_switch_as_often_as_they_are_said_to() -> None:
    law = laws.law("regime_switching:2.5", nodes=8)
    seconds = law.sample(20_000, 16, np.random.default_rng(0))
    slow = seconds[:, ::2] > 1.6
    # Both workers of a node are slow together, and nodes are slow by themselves.
    assert (slow == (seconds[:, 1::2] > 1.6)).all()
    assert np.abs(np.corrcoef(slow.T) - np.eye(8)).max() < 0.1
    assert slow.mean() == pytest.approx(0.25, abs=0.02)
    begins = (slow[1:] & ~slow[:-1]).sum() / (~slow[:-1]).sum()
    assert begins == pytest.approx(0.01, rel=0.1)
    assert seconds[:, ::2][slow].mean() == pytest.approx(2.5, rel=0.01)
    assert seconds[:, ::2][slow].std() == pytest.approx(0.125, rel=0.03)
    assert not slow[0].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected a law of chen2016, normal"),
        ("gamma", "Received: 'gamma'"),
        ("chen2016:1", "without a value"),
        ("normal:", "normal:CV with a positive number"),
        ("normal:-1", "Received: 'normal:-1'"),
        ("pareto:x", "pareto:A"),
        ("lognormal:nan", "lognormal:SIGMA"),
        ("exponential:inf", "exponential:MEAN"),
    ],
)
def test_other_laws_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        laws.law(text)


def test_no_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="nodes=0"):
        laws.law("regime_switching", nodes=0)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", FullSync()),
        ("backup:0", BackupWorkers(0)),
        ("backup:3", BackupWorkers(3)),
        ("deadline:0.25", Deadline(0.25)),
        ("elfving", Elfving()),
        ("elfving:7", Elfving(7)),
        ("order_statistics", OrderStatistics()),
        ("order_statistics:3", OrderStatistics(3)),
        ("oracle", bounds.GreedyOracle()),
    ],
)
def test_cutoffs_by_name(text: str, policy: object) -> None:
    assert names.cutoff(text, num_workers=4) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected a cutoff of the form full, backup:B"),
        ("back", "Received: 'back'"),
        ("full:1", "Received: 'full:1'"),
        ("backup", "Received: 'backup'"),
        ("backup:", "backup:B with an integer"),
        ("backup:-1", "Received: 'backup:-1'"),
        ("backup:1.5", "Received: 'backup:1.5'"),
        ("backup:4", "at most 3"),
        ("deadline:0", "deadline:SECONDS with a positive number"),
        ("elfving:0", "`window`"),
        ("order_statistics:x", "order_statistics:WINDOW with an integer"),
    ],
)
def test_other_cutoffs_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names.cutoff(text, num_workers=4)
