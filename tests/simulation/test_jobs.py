"""Simulated jobs: that they do what workers and a service would have done."""

import heapq

import numpy as np
import pytest

from tf_syncdist.cutoff import BackupWorkers, Deadline, Decision, FullSync, OrderStatistics
from tf_syncdist.cutoff.planning import Plan, TrainingRequest
from tf_syncdist.cutoff.replay import static_throughputs
from tf_syncdist.simulation import bounds, laws
from tf_syncdist.simulation.jobs import simulate


def heavy(rounds: int, workers: int, seed: int = 0) -> np.ndarray:
    """Run-times of which some are longer than several rounds."""
    return laws.Pareto(1.2).sample(rounds, workers, np.random.default_rng(seed))


@pytest.mark.parametrize("b", [0, 1, 7, 29])
def test_a_job_with_backup_workers_gives_the_order_statistics_of_its_times(b: int) -> None:
    seconds = heavy(50, 30)
    outcome = simulate(seconds, BackupWorkers(b))
    assert outcome.round_seconds == pytest.approx(np.sort(seconds, axis=1)[:, 29 - b])
    assert outcome.throughput == pytest.approx(static_throughputs(seconds)[29 - b])
    assert (outcome.contributions == 30 - b).all()
    assert outcome.dropped.sum() == 50 * b
    assert outcome.reason == f"the first {30 - b} of 30 are in"


def test_the_oracle_in_the_rounds_is_the_oracle_of_the_sorted_times() -> None:
    seconds = heavy(50, 30)
    outcome = simulate(seconds, bounds.GreedyOracle())
    assert outcome.throughput == pytest.approx(bounds.greedy_throughput(seconds))
    assert outcome.contributions.min() >= 8
    assert outcome.throughput >= bounds.best_static(seconds).throughput


def reference(seconds: np.ndarray, b: int) -> tuple[list[float], list[list[str]]]:
    """A job whose late workers stay busy, event by event, without the code of the service.

    Returns:
        When each round is closed, and what became of each worker in each round.
    """
    rounds, workers = seconds.shape
    fates = [["" for _ in range(workers)] for _ in range(rounds)]
    closed: list[float] = []
    events = [(seconds[0, w], w, 0) for w in range(workers)]
    heapq.heapify(events)
    number = 0
    while len(closed) < rounds:
        now, worker, run = heapq.heappop(events)
        if run < len(closed):
            fates[run][worker] = "late"
            for skipped in range(run + 1, len(closed)):
                fates[skipped][worker] = "skipped"
            run = len(closed)
            heapq.heappush(events, (now + seconds[run, worker], worker, run))
            continue
        fates[run][worker] = "contributed"
        number += 1
        if number == workers - b:
            closed.append(now)
            number = 0
            for w in range(workers):
                if fates[run][w] == "contributed" and run + 1 < rounds:
                    heapq.heappush(events, (now + seconds[run + 1, w], w, run + 1))
    return closed, fates


@pytest.mark.parametrize("b", [0, 1, 4, 11])
def test_late_workers_stay_busy_as_in_a_simulation_event_by_event(b: int) -> None:
    seconds = heavy(80, 12, seed=b)
    closed, fates = reference(seconds, b)
    outcome = simulate(seconds, BackupWorkers(b), late_workers_stay_busy=True)
    assert np.cumsum(outcome.round_seconds) == pytest.approx(closed)
    for name, counted in (
        ("contributed", outcome.contributed),
        ("late", outcome.dropped),
        ("skipped", outcome.skipped),
    ):
        assert counted.tolist() == [sum(r[w] == name for r in fates) for w in range(12)]
    if b > 1:
        assert outcome.skipped.sum() > 0
        assert outcome.throughput < simulate(seconds, BackupWorkers(b)).throughput


def test_a_timer_closes_a_round_between_two_arrivals() -> None:
    seconds = np.array([[1.0, 1.2, 1.4, 5.0]] * 3)
    outcome = simulate(seconds, Deadline(0.3))
    assert outcome.round_seconds == pytest.approx([1.3] * 3)
    assert outcome.contributions.tolist() == [2, 2, 2]
    assert outcome.dropped.tolist() == [0, 0, 3, 3]
    # Too few are in when the time is up: then the next arrival closes the round.
    outcome = simulate(seconds, Deadline(0.3, min_fraction=0.75))
    assert outcome.round_seconds == pytest.approx([1.4] * 3)
    # And nobody waits for a time that is up when all are in.
    outcome = simulate(seconds, Deadline(60.0))
    assert outcome.round_seconds == pytest.approx([5.0] * 3)


def test_a_planner_is_told_what_a_service_would_know() -> None:
    told = []

    class Listening(OrderStatistics):
        def planner(self, num_workers: int):
            class Planner:
                def observe(self, times):
                    told.append(times)

                def plan(self):
                    return Plan(2, 1.0, "two")

            return Planner()

    seconds = np.array([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]])
    simulate(seconds, Listening())
    assert [t.run for t in told] == [0, 1]
    assert told[0].seconds == pytest.approx([np.nan, 1.0, 2.0], nan_ok=True)
    assert told[1].seconds == pytest.approx([1.0, np.nan, 4.0], nan_ok=True)
    assert [t.closed_seconds for t in told] == pytest.approx([2.0, 4.0])
    assert all(t.present.all() for t in told)


def test_workers_that_are_busy_are_slow_in_the_eyes_of_a_planner() -> None:
    """Its time in a round is what it needs from the round's opening, the older one included."""
    told = []

    class Listening(BackupWorkers):
        def planner(self, num_workers: int):
            class Planner:
                def observe(self, times):
                    told.append(times.seconds)

                def plan(self):
                    return Plan(2, 1.0, "two")

            return Planner()

    seconds = np.array([[1.0, 1.0, 1.5], [1.0, 3.0, 1.0]])
    simulate(seconds, Listening(1), late_workers_stay_busy=True)
    assert told[0] == pytest.approx([1.0, 1.0, np.nan], nan_ok=True)
    # The third one is free half a second after the second round has begun.
    assert told[1] == pytest.approx([1.0, np.nan, 1.5], nan_ok=True)


def test_rounds_before_the_first_measured_one_only_teach() -> None:
    slow_start = np.concatenate((np.full((10, 4), 100.0), np.full((10, 4), 1.0)))
    outcome = simulate(slow_start, BackupWorkers(1), first_round=10)
    assert outcome.throughput == pytest.approx(3.0)
    assert outcome.dropped.sum() == 10
    assert len(outcome.contributions) == 10


def test_models_are_trained_between_two_rounds() -> None:
    """Without a trainer the planner goes on without a model."""
    log = []

    class Learning(FullSync):
        def planner(self, num_workers: int):
            class Planner:
                rounds = 0

                def observe(self, times):
                    self.rounds += 1

                def plan(self):
                    return Plan(num_workers, None, "")

                def training_request(self):
                    return TrainingRequest(None, 7) if self.rounds == 3 else None

                def accept(self, model):
                    log.append((self.rounds, model))
                    return "used"

                def training_failed(self, reason):
                    log.append((self.rounds, "failed", reason))

            return Planner()

    simulate(heavy(6, 3), Learning())
    assert log == []
    simulate(heavy(6, 3), Learning(), train=lambda request: (request.seed,))
    assert log == [(3, (7,))]
    simulate(heavy(6, 3), Learning(), train=lambda request: "no model today")
    assert log[1:] == [(3, "failed", "no model today")]


def test_a_policy_that_fails_ends_the_simulation() -> None:
    class Failing(FullSync):
        def decide(self, view) -> Decision:
            raise ArithmeticError("of this test")

    with pytest.raises(RuntimeError, match="Failing could not decide .*of this test"):
        simulate(heavy(3, 3), Failing())


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_times_that_are_none_are_refused(value: float) -> None:
    seconds = np.ones((4, 3))
    seconds[2, 1] = value
    with pytest.raises(ValueError, match=r"round 2, worker 1") as error:
        simulate(seconds, FullSync())
    assert str(value) in str(error.value)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 2, 2)])
def test_times_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of shape") as error:
        simulate(np.ones(shape), FullSync())
    assert str(list(shape)) in str(error.value)


def test_policies_and_rounds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="backup_workers=3 with 3 worker"):
        simulate(np.ones((2, 3)), BackupWorkers(3))
    with pytest.raises(ValueError, match="first_round=2"):
        simulate(np.ones((2, 3)), FullSync(), first_round=2)
