"""Gossip: experiments f1 to f3 of the digest of Jin et al."""

import numpy as np
import pytest

from tf_syncdist.mixing.gossip import Inbox, drawn, pulled, pushed, received

WORKERS = [8, 16, 128]


def pull_round(models: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One round in which every worker pulls from what all published before it."""
    after = []
    for worker, model in enumerate(models):
        partner = drawn(random, len(models))
        after.append(pulled(model, [] if partner == worker else [models[partner]]))
    return np.array(after)


def push_round(models: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One round in which every worker pushes before anybody mixes."""
    inboxes, itself = [Inbox()] * len(models), [False] * len(models)
    for worker, model in enumerate(models):
        partner = drawn(random, len(models))
        itself[worker] = partner == worker
        if partner != worker:
            inboxes[partner] = received(inboxes[partner], model)
    return np.array([pushed(*given) for given in zip(models, inboxes, itself, strict=True)])


def variance(models: np.ndarray) -> float:
    return float(np.sum((models - models.mean(0)) ** 2))


@pytest.mark.parametrize("workers", WORKERS)
def test_f1_f2_pull_mixes_and_moves_the_mean(workers: int) -> None:
    random = np.random.default_rng(workers)
    ratios, drifts = [], []
    for _ in range(400):
        models = random.normal(size=(workers, 200))
        after = pull_round(models, random)
        # About the mean before: the mean's own drift is what f2 is about.
        ratios.append(variance(after) / variance(models))
        drift = np.sum((after.mean(0) - models.mean(0)) ** 2)
        drifts.append(workers**2 * drift / variance(models))
    assert np.mean(ratios) == pytest.approx(0.5 - 1 / (4 * workers), abs=0.01)
    assert np.mean(drifts) == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize(("workers", "ratio"), [(8, 0.601), (16, 0.619), (128, 0.629)])
def test_f1_push_mixes_less(workers: int, ratio: float) -> None:
    random = np.random.default_rng(workers)
    ratios = []
    for _ in range(400):
        models = random.normal(size=(workers, 200))
        ratios.append(variance(push_round(models, random)) / variance(models))
    assert np.mean(ratios) == pytest.approx(ratio, abs=0.01)
    assert np.mean(ratios) > 0.5 - 1 / (4 * workers) + 0.05


def test_rules_of_a_single_exchange() -> None:
    assert pulled(1.0, []) == 1.0
    assert pulled(1.0, [3.0]) == 2.0
    assert pulled(1.0, [3.0, 5.0]) == 3.0
    inbox = received(received(Inbox(), 3.0), 5.0)
    assert pushed(1.0, inbox, drew_itself=False) == 3.0
    assert pushed(1.0, inbox, drew_itself=True) == 2.5
    assert pushed(1.0, Inbox(), drew_itself=True) == 1.0


def test_a_worker_draws_itself_as_often_as_any_other() -> None:
    random = np.random.default_rng(0)
    counts = np.bincount([drawn(random, 4) for _ in range(8000)], minlength=4)
    assert np.all(np.abs(counts - 2000) < 200)


def test_alone_nothing_is_mixed() -> None:
    random, models = np.random.default_rng(0), np.random.default_rng(1).normal(size=(1, 5))
    for _ in range(5):
        assert np.array_equal(pull_round(models, random), models)
        assert np.array_equal(push_round(models, random), models)
