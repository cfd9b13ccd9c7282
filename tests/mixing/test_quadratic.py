"""Training a noisy quadratic with each rule: experiments f3, f4 and f6 of Jin et al.'s digest."""

from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.mixing import averaging, elastic, gossip, parameter_server

RATE, SIZE, COORDINATES = 0.1, 1.0, 500


class Workers:
    """Workers at the minimum of a quadratic, whose gradients have noise of 1; no momentum."""

    def __init__(self, workers: int, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.models = np.zeros((workers, COORDINATES))
        self.centre = np.zeros(COORDINATES)
        self.run = 0

    def steps(self) -> np.ndarray:
        """Returns what each worker's optimizer adds to its model."""
        self.run += 1
        return -RATE * (SIZE * self.models + self.random.normal(size=self.models.shape))

    def spread(self) -> float:
        return float(np.mean(np.var(self.models, axis=0)))


def all_reduce(w: Workers) -> np.ndarray:
    w.models = w.models + w.steps().mean(0)
    return w.models.mean(0)


def pull(period: int) -> Callable[[Workers], np.ndarray]:
    def round_(w: Workers) -> np.ndarray:
        models = w.models = w.models + w.steps()
        if w.run % period == 0:
            partners = [gossip.drawn(w.random, len(models)) for _ in models]
            w.models = np.array(
                [gossip.pulled(m, [models[j]] * (j != i))
                 for i, (m, j) in enumerate(zip(models, partners, strict=True))]
            )  # fmt: skip
        return w.models.mean(0)

    return round_


def push(w: Workers) -> np.ndarray:
    models = w.models + w.steps()
    inboxes = [gossip.Inbox()] * len(models)
    partners = [gossip.drawn(w.random, len(models)) for _ in models]
    for i, j in enumerate(partners):
        if i != j:
            inboxes[j] = gossip.received(inboxes[j], models[i])
    w.models = np.array(
        [gossip.pushed(m, inboxes[i], partners[i] == i) for i, m in enumerate(models)]
    )
    return w.models.mean(0)


def elastic_averaging(w: Workers) -> np.ndarray:
    rate = elastic.default_moving_rate(len(w.models))
    steps = w.steps()
    for i in w.random.permutation(len(w.models)):
        w.models[i], w.centre = elastic.exchanged(w.models[i], w.centre, rate)
    w.models = w.models + steps
    return w.centre


def stationary(rule: Callable[[Workers], np.ndarray], workers: int) -> tuple[float, float]:
    """Returns the spread of replicas and the error of the model that is evaluated."""
    w, spreads, errors = Workers(workers), [], []
    for run in range(400):
        evaluated = rule(w)
        if run >= 60:
            spreads.append(w.spread())
            errors.append(np.mean(evaluated**2))
    return float(np.mean(spreads)), float(np.mean(errors))


@pytest.mark.parametrize(
    ("rule", "workers", "lowest", "highest"),
    [
        (pull(1), 8, 0.0067, 0.0083),
        (pull(1), 32, 0.0067, 0.0083),
        (push, 8, 0.010, 0.013),
        (push, 32, 0.010, 0.013),
        (pull(10), 8, 0.034, 0.039),
        (pull(10), 32, 0.034, 0.039),
        (elastic_averaging, 8, 0.024, 0.049),
        (elastic_averaging, 32, 0.024, 0.049),
    ],
    ids=[f"{rule}-{p}" for rule in ("pull", "push", "pull-10", "elastic") for p in (8, 32)],
)
def test_f3_how_far_replicas_are_from_one_another(
    rule: Callable[[Workers], np.ndarray], workers: int, lowest: float, highest: float
) -> None:
    found, error = stationary(rule, workers)
    assert 0.95 * lowest < found < 1.05 * highest
    spread, exact = stationary(all_reduce, workers)
    assert spread < 1e-25
    if rule is elastic_averaging:
        assert error < 1.05 * exact
    else:
        # 1.42 by calculation for many workers.
        assert error < 1.47 * exact


@pytest.mark.parametrize("workers", [1, 2, 4, 16, 100])
def test_f4_the_default_moving_rate_is_stable(workers: int) -> None:
    largest = elastic.largest_stable_moving_rate(workers)
    assert elastic.default_moving_rate(workers) < largest

    def size_after(rate: float) -> float:
        models, centre = np.ones(workers), 0.0
        for _ in range(800):
            # Synchronous rounds, in which all meet the same centre.
            given = [elastic.difference(m, centre, rate) for m in models]
            models = 0.95 * models - np.array(given)
            centre = centre + sum(given)
        return float(np.abs(models).max())

    assert size_after(elastic.default_moving_rate(workers)) < 0.1
    assert size_after(1.05 * largest) > 10


def test_f2_elastic_averaging_conserves_the_sum() -> None:
    random = np.random.default_rng(0)
    models, centre = random.normal(size=(8, 50)), random.normal(size=50)
    total = models.sum(0) + centre
    for _ in range(100):
        i = random.integers(8)
        models[i], centre = elastic.exchanged(models[i], centre, 0.1)
        assert np.allclose(models.sum(0) + centre, total, atol=1e-12)


def _alone_all_reduce(model: np.ndarray, step: np.ndarray) -> np.ndarray:
    return model + np.mean([step], axis=0)


def _alone_pull(model: np.ndarray, step: np.ndarray) -> np.ndarray:
    return gossip.pulled(model + step, [])


def _alone_push(model: np.ndarray, step: np.ndarray) -> np.ndarray:
    return gossip.pushed(model + step, gossip.Inbox(), drew_itself=True)


def _alone_server(model: np.ndarray, step: np.ndarray) -> np.ndarray:
    served = parameter_server.Served(model)
    return parameter_server.pushed(served, step).model


@pytest.mark.parametrize("rule", [_alone_all_reduce, _alone_pull, _alone_push, _alone_server])
def test_f6_alone_every_rule_is_plain_sgd_bit_for_bit(rule: Callable) -> None:
    """Elastic and model averaging leave mixing out where one is alone; see their strategies."""
    random = np.random.default_rng(0)
    model = plain = random.normal(size=100)
    for _ in range(50):
        noise = random.normal(size=100)
        model = rule(model, -RATE * (model + noise))
        plain = plain + -RATE * (plain + noise)
    assert np.array_equal(model, plain)


def test_f6_all_reduce_of_parts_is_one_worker_with_the_whole_batch() -> None:
    random = np.random.default_rng(0)
    models, whole = np.zeros((4, 10)), np.zeros(10)
    for _ in range(20):
        targets = random.normal(size=(4, 8, 10))
        gradients = [m - t.mean(0) for m, t in zip(models, targets, strict=True)]
        models = models - RATE * np.mean(gradients, axis=0)
        whole = whole - RATE * (whole - targets.reshape(-1, 10).mean(0))
    assert np.allclose(models, whole, atol=1e-13)


def test_staleness_is_what_others_have_pushed_since() -> None:
    served = parameter_server.Served(np.zeros(3))
    pulled = [served, served]
    for _ in range(3):
        step = parameter_server.difference(pulled[0].model - 0.1, pulled[0].model)
        served = pulled[0] = parameter_server.pushed(served, step)
    assert np.allclose(served.model, -0.3)
    assert parameter_server.staleness(served, pulled[0].version) == 0
    assert parameter_server.staleness(served, pulled[1].version) == 3
    assert parameter_server.accepts(served, pulled[1].version, None)
    assert parameter_server.accepts(served, pulled[1].version, 3)
    assert not parameter_server.accepts(served, pulled[1].version, 2)


def test_model_averaging_of_workers_in_lock_step_keeps_its_centre_in_the_middle() -> None:
    w, central = Workers(16), averaging.Central(np.zeros(COORDINATES), np.zeros(COORDINATES))
    for _ in range(50):
        mean = w.models.mean(0)
        models, central = averaging.averaged(list(w.models), list(w.steps()), central, 1 / 16)
        w.models = np.array(models)
        assert np.allclose(central.model, mean, atol=1e-13)
