"""Cutoffs that are planned or timed, over real sockets."""

import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tf_syncdist import cutoff
from tf_syncdist.aggregation import attendance, recovery, training
from tf_syncdist.cutoff import CutoffPolicy, Deadline, OrderStatistics, traces
from tf_syncdist.cutoff.order_statistics import OrderStatisticsPlanner
from tf_syncdist.errors import ServiceError
from tf_syncdist.proto import tf_syncdist_pb2 as pb

Serve = Callable[..., object]

NAMES = ("a", "b")


def start(serve: Serve, policy: CutoffPolicy, shards: int = 1, num_workers: int = 3) -> object:
    """Starts a service with a cutoff policy.

    It keeps all results: who needs one when the others have ended could be given no state.
    """
    text = cutoff.serialize(policy)
    return serve(num_workers, shards=shards, cutoff=text, history_rounds=200)


def train(service: object, workers: Sequence, seconds: Sequence[float], runs: int) -> None:
    """Each worker does some runs, of which each takes it so long to compute."""

    def program(worker: object, wait: float) -> None:
        site = worker.site(*NAMES)
        for _ in range(runs):
            worker.do_run(site, lambda: time.sleep(wait))

    service.together(
        *(lambda w=w, s=s: program(w, s) for w, s in zip(workers, seconds, strict=True))
    )
    assert len({w.bytes for w in workers}) == 1


def train_ahead(
    service: object,
    quick: Sequence,
    slow: Sequence,
    runs: int,
    compute: Callable[[object], object] = lambda worker: None,
    first: int = 0,
) -> None:
    """The slow workers have computed a run when the quick ones have done it, whenever that is.

    Args:
        service: The service.
        quick: The quick workers.
        slow: The slow ones.
        runs: How many runs they do.
        compute: What the quick ones do to compute.
        first: Before this run nobody is slow.
    """

    def is_over(worker: object) -> bool:
        run = worker.controller.run
        return run < first or all(w.controller.run > run for w in quick)

    def lag(worker: object) -> None:
        service.until(lambda: is_over(worker))

    def program(worker: object, compute: Callable[[object], object]) -> None:
        site = worker.site(*NAMES)
        for _ in range(runs):
            worker.do_run(site, lambda: compute(worker))

    service.together(
        *(functools.partial(program, w, compute) for w in quick),
        *(functools.partial(program, w, lag) for w in slow),
    )
    assert len({w.bytes for w in (*quick, *slow)}) == 1


def wait_for_plan(service: object, first: int = 0) -> None:
    """Waits until there is a plan for the run in progress, if it is not before a given one."""
    rounds = service.servers[0].job._rounds  # noqa: SLF001
    service.until(lambda: rounds.runs_over < first or rounds.plan is not None)


def in_time(service: object, shard: int, runs: int) -> list[int]:
    """Returns in how many rounds each worker was in all slices of a shard, when all are done."""

    def done() -> list[int] | None:
        workers = service.servers[shard].job.report().workers
        if any(w.contributed + w.late + w.replayed < runs for w in workers):
            return None
        return [w.contributed for w in workers]

    return service.until(done)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_deadline_closes_rounds_although_nothing_arrives(serve: Serve, shards: int) -> None:
    service = start(serve, Deadline(0.15, min_fraction=0.3), shards)
    workers = service.workers()
    began = []
    train_ahead(service, workers[:1], workers[1:], 6, lambda _: began.append(time.monotonic()))
    # The others' values come only when a round is over.
    assert np.diff(began).min() >= 0.15
    for shard in range(shards):
        assert in_time(service, shard, 6) == [6, 0, 0]
    assert "are over with 1 of 3" in workers[0].session.report().cutoff.reason


def test_everybody_in_closes_before_the_deadline(serve: Serve) -> None:
    service = start(serve, Deadline(60.0))
    began = time.monotonic()
    train(service, service.workers(), [0.0] * 3, 5)
    assert time.monotonic() - began < 40.0


@pytest.mark.parametrize("shards", [1, 2])
def test_all_shards_close_as_the_first_one_plans(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    observe = OrderStatisticsPlanner.observe

    def observe_usual(planner: OrderStatisticsPlanner, times: traces.RoundTimes) -> None:
        # A machine that has no time for one of the quick ones would change the plan.
        seconds = np.array([0.05, 0.06, 0.5])
        observe(planner, times._replace(seconds=seconds, closed_seconds=0.06))

    monkeypatch.setattr(OrderStatisticsPlanner, "observe", observe_usual)
    service = start(serve, OrderStatistics(window=5), shards)
    workers = service.workers()
    began = time.monotonic()
    # The first round is waited for, as nothing is planned for it.
    train_ahead(
        service, workers[:2], workers[2:], 15, lambda _: wait_for_plan(service, first=1), first=1
    )
    took = time.monotonic() - began
    for shard in range(shards):
        assert in_time(service, shard, 15) == [15, 15, 1]
    report = workers[0].session.report().cutoff
    assert report.policy == "OrderStatistics(window=5, min_fraction=0.25)"
    assert (report.least, report.most, report.rounds) == (2, 3, 15)
    # It is a median of 14 rounds.
    assert 0 < report.closed_seconds <= took / 7
    assert report.expected_seconds == pytest.approx(0.06)
    assert report.reason == "best of the last 5 round(s)" and not report.failure
    # A reason is said when it is another one than before.
    said = [e for e in service.events if e.startswith("round ") and "planned" in e]
    assert 1 <= len(said) <= 4, said


def test_a_shard_that_is_started_again_goes_on_with_the_plan(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attendance, recovery):
        # A worker that has no turn for seconds would be left out.
        monkeypatch.setattr(module, "GRACE_SECONDS", 30.0)
    service = start(serve, OrderStatistics(window=5), shards=2)
    workers = service.workers()
    train(service, workers, [0.0, 0.01, 0.2], 4)
    for shard in range(2):
        service.restart(shard)
        train(service, workers, [0.0, 0.01, 0.2], 4)
    assert all(w.controller.run == 12 for w in workers)
    assert workers[0].session.report().cutoff.rounds < 12, "it begins anew"


@pytest.mark.parametrize("what", ["observe", "plan", "decide"])
def test_full_sync_takes_over_from_a_policy_that_fails(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    calls = []

    def fail(*_: object) -> None:
        calls.append(what)
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(OrderStatistics if what == "decide" else OrderStatisticsPlanner, what, fail)
    service = start(serve, OrderStatistics())
    workers = service.workers()
    train(service, workers, [0.0, 0.0, 0.1], 4)
    assert in_time(service, 0, 4) == [4] * 3
    service.until(lambda: any("full sync" in n for n in service.notices[0]))
    assert len(calls) == 1
    (notice,) = [n for n in service.notices[0] if "full sync" in n]
    assert f"OrderStatistics could not {what} (ZeroDivisionError: of the test)" in notice
    assert not any("full sync" in n for n in service.notices[1] + service.notices[2])
    assert what in workers[0].session.report().cutoff.failure


@pytest.mark.parametrize("shards", [1, 2])
def test_full_sync_takes_over_where_the_model_is_gone(serve: Serve, shards: int) -> None:
    service = start(serve, cutoff.LearnedCutoff("nowhere.npz"), shards)
    train(service, service.workers(), [0.0, 0.0, 0.1], 3)
    assert in_time(service, 0, 3) == [3] * 3
    (notice,) = [n for n in service.notices[0] if "full sync" in n]
    assert "LearnedCutoff could not begin to plan (RunTimeModelError" in notice


def test_a_plan_beyond_the_workers_is_a_failure(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cutoff.Plan(4, None, "of the test")
    monkeypatch.setattr(OrderStatisticsPlanner, "plan", lambda planner: plan)
    service = start(serve, OrderStatistics())
    train(service, service.workers(), [0.0] * 3, 3)
    why = "from 1 to the number of workers, 3. Received: 4"
    service.until(lambda: any(why in n for n in service.notices[0]))


def test_a_planner_that_is_slower_than_the_rounds_keeps_none_of_them_waiting(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    go_on = threading.Event()

    def think(planner: OrderStatisticsPlanner) -> cutoff.Plan:
        calls.append(planner)
        assert len(calls) == 1 or go_on.wait(100)
        return cutoff.Plan(2, None, "of the test")

    monkeypatch.setattr(OrderStatisticsPlanner, "plan", think)
    service = start(serve, OrderStatistics())
    workers = service.workers()
    try:
        train(service, workers, [0.0] * 3, 1)
        wait_for_plan(service)
        # For all these rounds it makes one more plan, and is not done.
        train_ahead(service, workers[:2], workers[2:], 20)
        assert in_time(service, 0, 21) == [21, 21, 1]
        service.until(lambda: len(calls) == 2)
    finally:
        go_on.set()


def test_gathers_are_closed_by_the_last_plan(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cutoff.Plan(2, None, "of the test")
    monkeypatch.setattr(OrderStatisticsPlanner, "plan", lambda planner: plan)
    service = start(serve, OrderStatistics())
    workers = service.workers()
    train(service, workers, [0.0] * 3, 1)
    wait_for_plan(service)
    train(service, workers, [0.0] * 3, 3)
    gathered = service.together(
        *(lambda w=w: w.session.gather(pb.METRICS, 1, 4) for w in workers[:2])
    )
    assert all(sorted(g.contributors) == [0, 1] for g in gathered)


def test_a_gather_is_closed_by_a_deadline(serve: Serve) -> None:
    service = start(serve, Deadline(0.1, min_fraction=0.3))
    workers = service.workers()
    began = time.monotonic()
    assert workers[1].session.gather(pb.METRICS, 1, 0).contributors == (1,)
    assert 0.1 <= time.monotonic() - began < 15.0


def test_the_first_shard_records_how_long_workers_take(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    service = serve(3, b=1, record_trace=str(path), history_rounds=20)
    workers = service.workers()

    train_ahead(service, workers[:2], workers[2:], 6, lambda w: time.sleep(0.2 * (w is workers[1])))
    in_time(service, 0, 6)
    service.close()

    def whole() -> traces.Trace | None:
        trace = traces.load(path, num_workers=3) if path.exists() else None
        return trace if trace is not None and trace.num_rounds == 6 else None

    trace = service.until(whole)
    assert trace.present.all()
    # The first run waits for variables.
    first, second, third = trace.seconds[1:].T
    assert np.median(first) < 0.2 <= second.min() and np.isnan(third).all()
    assert np.median(trace.closed_seconds[1:]) == pytest.approx(np.median(second), abs=0.1)


@pytest.mark.slow
def test_a_model_is_trained_beside_the_job(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (sys.executable, "-m", "tf_syncdist.train_cutoff", "--steps=20")
    quick = functools.partial(training.Training, command=command)
    monkeypatch.setattr("tf_syncdist.aggregation.planning.Training", quick)
    service = start(serve, cutoff.LearnedCutoff(warmup_rounds=100))
    workers = service.workers()
    train(service, workers, [0.005, 0.005, 0.02], 110)
    begins = "a model of the workers' run-times is being trained"
    service.until(lambda: begins in service.events)
    deadline = time.monotonic() + 150
    while not (found := [e for e in service.events if "trained: " in e]):
        assert time.monotonic() < deadline
        train(service, workers, [0.02, 0.02, 0.04], 20)
    assert "on held-out rounds it gives" in found[0]
    assert not any("full sync" in n for n in service.notices[0]), service.notices[0]


@pytest.mark.parametrize("policy", [Deadline(1.0), OrderStatistics(), cutoff.BackupWorkers(1)])
def test_sums_in_order_need_all_workers(serve: Serve, policy: CutoffPolicy) -> None:
    service = serve(3, cutoff=cutoff.serialize(policy), deterministic=True)
    with pytest.raises(ServiceError, match="Expected a policy that waits for all workers"):
        service.session(0)


@pytest.mark.parametrize("shard", [0, 1])
def test_only_sensible_plans_are_taken(serve: Serve, shard: int) -> None:
    service = start(serve, OrderStatistics(), shards=2)
    first = service.sessions()[0]
    count = 2 if shard == 0 else 4
    first._send(shard, pb.ToAggregator(cutoff_plan=pb.CutoffPlan(count=count)))  # noqa: SLF001
    with pytest.raises(ServiceError, match="Expected plans of 1 to 3 contributions"):
        first.wait_over(0)
