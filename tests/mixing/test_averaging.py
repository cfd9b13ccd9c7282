"""Synchronous model averaging: the experiments f1 to f7 of the digest of CROSSBOW."""

import numpy as np
import pytest

from tf_syncdist.mixing.averaging import (
    Central,
    averaged,
    averaged_in_groups,
    default_correction,
    largest_stable_correction,
    restarts,
)

LEARNERS = [1, 2, 4, 8, 16, 32]


def together(learners: int, size: int, seed: int = 0) -> tuple[np.ndarray, Central]:
    """Returns learners that have come apart, and a central model elsewhere."""
    random = np.random.default_rng(seed)
    return random.normal(size=(learners, size)), Central(random.normal(size=size), np.zeros(size))


def spread(models: np.ndarray) -> float:
    return float(np.linalg.norm(models - models.mean(0)))


@pytest.mark.parametrize("learners", LEARNERS)
def test_f1_the_central_model_is_the_mean_of_the_learners(learners: int) -> None:
    random = np.random.default_rng(1)
    models, central = together(learners, 20)
    for _ in range(50):
        mean = np.mean(models, axis=0)
        steps = 0.1 * random.normal(size=np.shape(models))
        models, central = averaged(models, steps, central, default_correction(learners))
        assert np.linalg.norm(central.model - mean) < 1e-12


@pytest.mark.parametrize("correction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("learners", [1, 3, 8])
def test_f2_without_steps_the_sum_of_all_models_stays(learners: int, correction: float) -> None:
    models, central = together(learners, 20)
    total = models.sum(0) + central.model
    for _ in range(10):
        models, central = averaged(models, np.zeros_like(models), central, correction)
        scale = max(1.0, np.abs(models).max())
        assert np.allclose(np.sum(models, axis=0) + central.model, total, atol=1e-11 * scale)


@pytest.mark.parametrize("learners", [2, 8])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.1])
def test_f2_rates_at_which_models_come_together(learners: int, share: float) -> None:
    correction = share / learners
    models, central = together(learners, 20)
    zeros = np.zeros_like(models)
    for _ in range(5):
        apart, off = spread(models), models.mean(0) - central.model
        models, central = averaged(models, zeros, central, correction)
        models = np.array(models)
        assert spread(models) == pytest.approx((1 - correction) * apart, rel=1e-9)
        rate = 1 - correction * (learners + 1)
        assert np.allclose(models.mean(0) - central.model, rate * off, atol=1e-12)


def test_f2_models_converge_to_the_common_mean() -> None:
    models, central = together(4, 20)
    mean = (models.sum(0) + central.model) / 5
    for _ in range(300):
        models, central = averaged(models, np.zeros((4, 20)), central, 0.25)
    assert np.allclose(models, mean) and np.allclose(central.model, mean)


@pytest.mark.parametrize(
    ("learners", "largest"),
    [(1, 0.987), (2, 0.661), (4, 0.398), (8, 0.221), (16, 0.117), (32, 0.060)],
)
def test_f3_the_largest_stable_correction(learners: int, largest: float) -> None:
    def size_after(correction: float) -> float:
        models, central = np.ones((learners, 1)), Central(np.zeros(1), np.zeros(1))
        for _ in range(800):
            steps = [-0.05 * m for m in models]
            models, central = averaged(models, steps, central, correction)
        return float(np.abs(models).max())

    assert size_after(0.95 * largest) < 0.1
    assert size_after(1.05 * largest) > 10.0
    assert largest == pytest.approx(largest_stable_correction(learners), rel=0.1)
    assert largest < largest_stable_correction(learners)


class Quadratic:
    """The noisy quadratic of the digest: 64 dimensions, curvatures from .05 to 1, noise of 1.

    Many copies of the problem are trained at once.
    """

    def __init__(self, learners: int, copies: int = 60, seed: int = 0) -> None:
        self.curvatures = np.linspace(0.05, 1.0, 64)
        self.random = np.random.default_rng(seed)
        self.models = np.full((learners, copies, 64), 4.0)
        self.central = Central(np.full((copies, 64), 4.0), np.zeros((copies, 64)))
        self.learners = learners

    def run(
        self,
        runs: int,
        correction: float,
        rate: float = 0.05,
        momentum: float = 0.0,
        period: int = 1,
    ) -> np.ndarray:
        """Returns the loss of the central model after each run, averaged over the copies."""
        losses = np.empty(runs)
        for run in range(runs):
            noise = self.random.normal(size=self.models.shape)
            steps = -rate * (self.curvatures * self.models + noise)
            if run % period == 0:
                models, self.central = averaged(
                    list(self.models), list(steps), self.central, correction, momentum
                )
                self.models = np.array(models)
            else:
                self.models = self.models + steps
            losses[run] = self.loss(self.central.model)
        return losses

    def go_to_minimum(self) -> None:
        self.models[:], self.central = 0.0, Central(0.0 * self.central.model, self.central.move)

    def loss(self, model: np.ndarray) -> float:
        return float(0.5 * np.mean(np.sum(self.curvatures * model**2, axis=-1)))

    def floor(self, correction: float, momentum: float = 0.0, period: int = 1) -> float:
        """Returns the loss at which training ends."""
        self.go_to_minimum()
        return float(self.run(1200, correction, momentum=momentum, period=period)[400:].mean())


def steps_to_five_percent(momentum: float = 0.0, period: int = 1) -> int:
    problem = Quadratic(8, copies=100)
    before = problem.loss(problem.central.model)
    losses = problem.run(120, 1 / 8, momentum=momentum, period=period)
    return int(np.argmax(losses < 0.05 * before)) + 1


def test_f4_noise_falls_with_the_number_of_learners() -> None:
    one = Quadratic(1, copies=40).floor(0.5)
    eight = Quadratic(8, copies=10).floor(1 / 8)
    many = Quadratic(32, copies=4).floor(1 / 32)
    assert one == pytest.approx(0.36, rel=0.15)
    assert eight == pytest.approx(0.084, rel=0.15)
    assert many == pytest.approx(0.023, rel=0.15)
    assert eight / many == pytest.approx(32 / 8, rel=0.2)


def test_f5_momentum_of_the_central_model_is_faster_and_noisier() -> None:
    steps = [steps_to_five_percent(momentum=m) for m in (0.0, 0.5, 0.9)]
    floors = [Quadratic(8, copies=10).floor(1 / 8, momentum=m) for m in (0.0, 0.5, 0.9)]
    assert steps == pytest.approx([69, 65, 61], abs=4)
    assert steps[0] > steps[1] > steps[2]
    assert floors == pytest.approx([0.084, 0.092, 0.109], rel=0.12)
    assert floors[0] < floors[1] < floors[2]


def test_f6_averaging_less_often_is_worse_but_little() -> None:
    periods = (1, 2, 4, 16)
    steps = [steps_to_five_percent(period=p) for p in periods]
    floors = [Quadratic(8, copies=10).floor(1 / 8, period=p) for p in periods]
    assert steps == pytest.approx([69, 69, 71, 79], abs=5)
    assert floors == pytest.approx([0.0838, 0.0844, 0.0854, 0.0897], rel=0.12)
    assert steps[3] > steps[0] and floors[3] > floors[0]
    assert floors[2] < 1.1 * floors[0]


def after_a_drop(restart: bool, correction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss of the central model and of the learners after each run from the drop on."""
    problem = Quadratic(8, copies=12)
    problem.go_to_minimum()
    problem.run(300, correction)
    if restart:
        problem.models = np.broadcast_to(problem.central.model, problem.models.shape).copy()
    central, learners = [], []
    for _ in range(400):
        central += list(problem.run(1, correction, rate=0.005))
        learners.append(problem.loss(problem.models))
    return np.array(central), np.array(learners)


@pytest.mark.parametrize("correction", [1 / 8, 0.02])
def test_f7_a_restart_helps_right_after_the_learning_rate_drops(correction: float) -> None:
    (central, learners), (central_without, learners_without) = (
        after_a_drop(restart, correction) for restart in (True, False)
    )
    assert learners[:10].mean() < 0.8 * learners_without[:10].mean()
    # Where averaging is strong, the central model is where learners are, and gains nothing.
    gains = central[:40].mean() < 0.97 * central_without[:40].mean()
    assert gains == (correction < 1 / 8)
    assert central[-100:].mean() == pytest.approx(central_without[-100:].mean(), rel=0.15)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_levels_are_the_same_as_one(momentum: float) -> None:
    random = np.random.default_rng(3)
    models, central = together(6, 20)
    groups, references = [list(models[:1]), list(models[1:3]), list(models[3:])], [central] * 3
    for _ in range(20):
        steps = 0.1 * random.normal(size=(6, 20))
        models, central = averaged(models, steps, central, 1 / 6, momentum)
        groups, references = averaged_in_groups(
            groups, [steps[:1], steps[1:3], steps[3:]], references, 1 / 6, momentum
        )
    assert np.allclose(np.concatenate(groups), models, atol=1e-12)
    assert all(np.array_equal(r.model, references[0].model) for r in references)
    assert np.allclose(references[0].model, central.model, atol=1e-12)


def test_a_drop_of_the_learning_rate_is_one_of_a_step_and_not_of_a_smooth_schedule() -> None:
    assert restarts(0.01, 0.1) and restarts(0.05, 0.1)
    assert not restarts(0.099, 0.1) and not restarts(0.2, 0.1)


@pytest.mark.parametrize(
    ("central_momentum", "stable", "unstable"),
    [(0.0, 1.8, 2.0), (0.5, 2.3, 2.5), (0.9, 0.2, 0.3)],
)
def test_momentum_twice_leaves_two_learners_a_smaller_learning_rate(
    central_momentum: float, stable: float, unstable: float
) -> None:
    # Of the learning rate times the curvature; an optimizer with momentum 0.9 alone bears 3.8.
    for rate, converges in ((stable, True), (unstable, False)):
        models, velocities = np.ones((2, 1)), np.zeros((2, 1))
        central = Central(np.ones(1), np.zeros(1))
        for _ in range(2000):
            velocities = 0.9 * velocities - rate * models
            models, central = averaged(models, velocities, central, 0.5, central_momentum)
            models = np.array(models)
            if abs(central.model[0]) > 1e6:
                break
        assert (abs(central.model[0]) < 1e-3) == converges
