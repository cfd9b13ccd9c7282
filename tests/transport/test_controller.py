"""Workers as their controllers take them through runs, with a real service and no TensorFlow."""

import functools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tf_syncdist.errors import ModelMismatchError, ServiceError, WaitTimeoutError
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies import controller
from tf_syncdist.strategies.controller import LocalReport, Mode

Serve = Callable[..., object]


def together(service: object, workers: list, method: str, *args: object) -> None:
    """Lets all workers do the same at the same time, at a site of their own."""
    service.together(*(functools.partial(getattr(w, method), w.site(), *args) for w in workers))


def test_the_controller_knows_no_tensorflow() -> None:
    code = "import sys, tf_syncdist.strategies.controller; print('tensorflow' in sys.modules)"
    root = Path(controller.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, timeout=60, check=True
    )
    assert result.stdout.split() == [b"False"]


@pytest.mark.parametrize("num_workers, b, shards", [(1, 0, 1), (3, 0, 2), (3, 1, 1), (4, 2, 2)])
def test_all_workers_end_with_the_variables_of_the_first_trained_alike(
    serve: Serve, num_workers: int, b: int, shards: int
) -> None:
    service = serve(num_workers, b=b, shards=shards)
    workers = service.workers()
    together(service, workers, "do_runs", 20)
    assert len({w.bytes for w in workers}) == 1
    assert workers[0].bytes
    for worker in workers:
        report = worker.controller.report()
        assert report.rounds == sum(worker.counts) == 20
        assert report.worker == worker.session.config.worker
        assert report.num_workers == num_workers
        assert report.wall_seconds > 0
        assert worker.begun == worker.controller.run == 20
        assert worker.controller.runs_done == (20, 20 - worker.modes.count(Mode.REPLAY))
        assert b or worker.counts == (20, 0, 0, 0)
        service.until(lambda w=worker: w.reported == w.counts)
    # At least N workers are in every slice, so at least one is in each round.
    assert sum(w.counts[0] + w.counts[1] for w in workers) >= 20 * (num_workers - b)


def test_before_the_first_run_the_report_is_empty(serve: Serve) -> None:
    (worker,) = serve(1).workers()
    assert worker.controller.report() == LocalReport(0, 1, 0, 0, 0, 0, 0, 0.0)


def test_exchanges_are_counted_as_they_come_and_runs_without_are_no_rounds(serve: Serve) -> None:
    service = serve(2, shards=2)
    workers = service.workers()
    sites = [w.site("a", "b") for w in workers]
    for exchanges in (0, 2, 0, 0, 3, 1):
        service.together(
            *(
                functools.partial(w.do_run, s, exchanges=exchanges)
                for w, s in zip(workers, sites, strict=True)
            )
        )
    assert [w.counts for w in workers] == [(3, 0, 0, 0)] * 2
    assert [w.controller.run for w in workers] == [6, 6]
    service.until(lambda: all(w.reported == w.counts for w in workers))
    assert workers[0].session.report().rounds == 3
    assert workers[0].bytes == workers[1].bytes


def test_a_site_without_outputs_yet_computes_though_its_round_is_over(serve: Serve) -> None:
    """It has no outputs to return, so it computes, and the stored result stands in."""
    service = serve(3, b=1)
    first, second, slow = service.workers()
    together(service, [first, second, slow], "do_run")
    service.together(*(functools.partial(w.do_runs, w.site(), 2) for w in (first, second)))
    service.until(lambda: slow.session.exchanges_of(2) is not None)
    counts = slow.counts
    for _ in range(2):
        slow.do_run(slow.site())
    assert slow.modes[-2:] == [Mode.COMPUTE] * 2
    assert slow.counts == (counts[0], counts[1] + 2, 0, 0)
    assert len({w.bytes for w in (first, second, slow)}) == 1


def test_variables_of_a_later_site_come_from_worker_0_too(serve: Serve) -> None:
    service = serve(3)
    workers = service.workers()
    together(service, workers, "do_runs", 2)
    service.together(*(functools.partial(w.do_runs, w.site("a", "b"), 2) for w in workers))
    assert [len(w.store.read()) for w in workers] == [2] * 3
    assert len({w.bytes for w in workers}) == 1


def test_workers_with_other_variables_stop_before_their_first_run(serve: Serve) -> None:
    service = serve(2)
    workers = service.workers()
    workers[1].store.values["b"] = workers[1].store.values["b"][:2]

    def begin(worker: object) -> str:
        with pytest.raises(ModelMismatchError, match=r"variable 1 is b \(float32, shape") as error:
            worker.do_run(worker.site("a", "b"))
        assert worker.controller.error is error.value
        return str(error.value)

    errors = service.together(*(functools.partial(begin, w) for w in workers))
    assert errors[0] == errors[1]
    assert [w.controller.run for w in workers] == [0, 0]


def test_the_first_error_stays_the_error(serve: Serve) -> None:
    """TensorFlow buries an error, and the program may call again before it looks for it."""
    service = serve(2, timeout_seconds=0.2)
    worker, _ = service.workers()
    site = worker.site()
    with pytest.raises(WaitTimeoutError) as error:
        worker.do_run(site)
    worker.session.cancel(KeyError("later"))
    for call in (
        lambda: worker.controller.begin(site),
        lambda: worker.controller.finish(site, None),
        lambda: worker.controller.stored(worker.controller.plan([])),
        lambda: worker.controller.exchange([]),
    ):
        with pytest.raises(WaitTimeoutError) as again:
            call()
        assert again.value is error.value is worker.controller.error


def test_a_service_that_is_gone_is_the_error_of_the_run(serve: Serve) -> None:
    service = serve(1)
    (worker,) = service.workers()
    worker.do_run(worker.site())
    service.be_impatient(connect_timeout_seconds=0.5)
    service.servers[0].close(grace_seconds=0)
    service.until(lambda: worker.session.has_failed)
    with pytest.raises(ServiceError, match=service.config.addresses[0]):
        worker.do_run(worker.site())


def test_runs_after_the_end_of_the_job_do_nothing_and_say_so_once(serve: Serve) -> None:
    """The round that somebody may have begun when the first program ended still takes place."""
    service = serve(2)
    workers = service.workers()
    together(service, workers, "do_runs", 3)
    workers[0].session.goodbye(pb.FINISHED, 3)
    service.until(workers[1].session.job_over_at)
    site = workers[1].site()
    workers[1].do_run(site)
    before = workers[1].bytes
    workers[1].do_runs(site, 4)
    assert workers[1].modes[3:] == [Mode.COMPUTE] + [Mode.SKIP] * 4
    assert workers[1].bytes == before
    assert workers[1].controller.run == 4 and workers[1].counts == (4, 0, 0, 0)
    (notice,) = workers[1].notices
    assert "worker 0" in notice and "4 run" in notice
    assert workers[1].begun == 8


def test_a_run_that_had_begun_when_the_job_ended_takes_place_for_all_that_are_left(
    serve: Serve,
) -> None:
    service = serve(3)
    short, begun, third = workers = service.workers()
    sites = [w.site() for w in workers]
    service.together(
        *(functools.partial(w.do_runs, s, 3) for w, s in zip(workers, sites, strict=True))
    )
    computing = threading.Event()

    def end() -> None:
        computing.set()
        service.until(begun.session.job_over_at)

    def finish() -> None:
        assert computing.wait(30)
        short.session.goodbye(pb.FINISHED, 3)
        service.until(third.session.job_over_at)
        third.do_runs(sites[2], 3)

    service.together(lambda: (begun.do_run(sites[1], end), begun.do_runs(sites[1], 2)), finish)
    assert begun.controller.run == third.controller.run == 4
    assert begun.bytes == third.bytes


def test_a_short_program_that_is_behind_ends_the_job_where_all_can_still_meet(
    serve: Serve,
) -> None:
    """The first worker is at run 5 already when the last one ends after a single run."""
    service = serve(3, b=2)
    ahead, behind, short = workers = service.workers()
    sites = [w.site() for w in workers]
    service.together(*(functools.partial(w.do_run, s) for w, s in zip(workers, sites, strict=True)))
    ahead.do_runs(sites[0], 4)
    service.until(lambda: ahead.reported == ahead.counts)
    short.session.goodbye(pb.FINISHED, 1)
    for worker in (ahead, behind):
        service.until(worker.session.job_over_at)
    service.together(
        *(functools.partial(w.do_runs, s, 6) for w, s in ((ahead, sites[0]), (behind, sites[1])))
    )
    assert ahead.controller.run == behind.controller.run == 6
    assert ahead.bytes == behind.bytes


def test_the_state_is_given_on_request_as_it_is_before_the_next_run(serve: Serve) -> None:
    service = serve(2, b=1)
    giver, receiver = service.workers()
    together(service, [giver, receiver], "do_run")
    giver.do_runs(giver.site(), 2)
    receiver.session.request_state(1)
    stop = threading.Event()

    def receive() -> object:
        try:
            return receiver.session.receive_state(receiver.store.specs())
        finally:
            stop.set()

    state, _ = service.together(receive, functools.partial(giver.answer, stop))
    assert state.run == 3
    assert [v.tobytes() for v in state.values] == [giver.bytes]
