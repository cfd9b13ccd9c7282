"""Gathers of workers with a real service, over real sockets."""

import functools
from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.aggregation import gathers
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.errors import ServiceError
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
WAY = plan([TensorSpec("float32", (2,))], 100, 1)


def do_run(session: Session, run: int) -> None:
    """Takes a worker through a run."""
    session.send(run, 0, WAY, [np.ones(2, "f4")])
    session.receive(run, 0, WAY, [np.empty(2, "f4")])
    session.finish(run, 1, Fate.CONTRIBUTED)


def metrics(session: Session, run: int, values: np.ndarray) -> np.ndarray:
    """Returns the sum of the workers' metrics after `run` runs."""
    return session.gather(pb.METRICS, run, run, 5, values).values


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_metrics_are_summed_to_the_same_bytes(serve: Serve, size: int) -> None:
    service = serve(3, shards=2)
    sessions = service.sessions()
    values = np.random.default_rng(0).normal(size=(2, 3, size))
    for run in range(2):
        results = service.together(
            *(
                functools.partial(metrics, s, run, v)
                for s, v in zip(sessions, values[run], strict=True)
            )
        )
        assert len({r.tobytes() for r in results}) == 1
        np.testing.assert_allclose(results[0], values[run].sum(0), atol=1e-12)
        for session in sessions:
            session.finish(run, 0, Fate.CONTRIBUTED)


def test_who_is_late_gets_the_metrics_of_the_others(serve: Serve) -> None:
    service = serve(3, b=1)
    first, second, slow = service.sessions()
    one = np.ones(2)
    on_time = service.together(*(functools.partial(metrics, s, 0, one) for s in (first, second)))
    assert [r.tolist() for r in on_time] == [[2, 2]] * 2
    assert metrics(slow, 0, one * 100).tolist() == [2, 2]


def test_who_has_none_and_comes_first_gets_the_metrics_of_the_others(serve: Serve) -> None:
    """A straggler that has replayed all rounds of an epoch may be the first to end it."""
    service = serve(2, b=1)
    busy, idle = service.sessions()
    gathers_there = service.servers[0].job._gathers

    def come_first() -> np.ndarray:
        return idle.gather(pb.METRICS, 0, 0, 5, np.zeros(2), empty=True).values

    def come() -> np.ndarray:
        service.until(lambda: gathers_there.waiting)
        return metrics(busy, 0, np.ones(2))

    assert [r.tolist() for r in service.together(come_first, come)] == [[1, 1]] * 2


def test_nobody_waits_for_the_metrics_of_a_worker_that_goes_on_or_leaves(serve: Serve) -> None:
    service = serve(3)
    first, second, leaver = service.sessions()

    def go_on() -> None:
        second.finish(0, 0, Fate.CONTRIBUTED)
        leaver.close()

    result, _ = service.together(lambda: metrics(first, 0, np.ones(2)), go_on)
    assert result.tolist() == [1, 1]


def test_nobody_waits_for_the_metrics_of_a_worker_that_has_begun_the_next_run(serve: Serve) -> None:
    """One worker alone reads a metric after run 0, and the other waits for it in run 1."""
    service = serve(2)
    first, second = service.sessions()
    service.together(lambda: do_run(first, 0), lambda: do_run(second, 0))
    result, _ = service.together(
        lambda: (metrics(first, 1, np.ones(2)).tolist(), do_run(first, 1))[0],
        lambda: do_run(second, 1),
    )
    assert result == [1, 1]


def test_metrics_that_differ_are_refused(serve: Serve) -> None:
    """Whoever comes second is refused, and the first goes on alone."""
    service = serve(2)

    def exchange(session: Session, size: int) -> str | list[float]:
        try:
            return metrics(session, 0, np.ones(size)).tolist()
        except ServiceError as e:
            return str(e)

    results = service.together(
        *(
            functools.partial(exchange, s, n)
            for s, n in zip(service.sessions(), (2, 3), strict=True)
        )
    )
    (error,) = (r for r in results if isinstance(r, str))
    assert "INVALID_ARGUMENT" in error and "2 value(s)" in error and "3 value(s)" in error
    assert [1.0, 1.0] in results or [1.0, 1.0, 1.0] in results


@pytest.mark.parametrize("b", [0, 1])
def test_a_start_waits_for_worker_0_and_tells_its_hashes(serve: Serve, b: int) -> None:
    service = serve(3, b=b)
    first, second, third = service.sessions()

    def start(session: Session) -> object:
        worker = session.config.worker
        if not worker:
            gathers = service.servers[0].job._gathers._gathers._gathers
            service.until(lambda: [len(g.contributors) for g in list(gathers.values())] == [2])
        return session.gather(pb.START, 0, 0, hashes=[worker, 2**64 - 1], stop=worker == 2)

    results = service.together(
        *(functools.partial(start, session) for session in (first, second, third)),
    )
    for result in results:
        assert sorted(result.contributors) == [0, 1, 2] and result.contributors[-1] == 0
        assert result.reference == 0 and result.hashes == (0, 2**64 - 1)
        assert result.values.size == 0 and result.stop


def test_without_worker_0_the_lowest_worker_is_the_reference(serve: Serve) -> None:
    service = serve(3)
    first, second, third = service.sessions()
    first.close()
    results = service.together(
        *(
            functools.partial(s.gather, pb.START, 0, 0, hashes=[s.config.worker])
            for s in (second, third)
        )
    )
    for result in results:
        assert (result.reference, result.hashes, result.stop) == (1, (1,), False)


def test_who_joins_late_gets_what_was_gathered(serve: Serve) -> None:
    service = serve(3, b=1)
    first, second = service.session(0), service.session(1)
    service.together(*(functools.partial(metrics, s, 0, np.ones(1)) for s in (first, second)))
    assert metrics(service.session(2), 0, np.ones(1)).tolist() == [2]


def test_who_goes_on_from_a_later_run_gets_what_was_gathered_before(serve: Serve) -> None:
    """It has taken over a state of run 2, and its program has yet to pass the end of run 1."""
    service = serve(3, b=1)
    first, second, third = service.sessions()

    def gather(run: int) -> None:
        service.together(*(functools.partial(metrics, s, run, np.ones(1)) for s in (first, second)))
        service.until(lambda: (pb.METRICS, run) in third._gathered)

    for run in range(2):
        service.together(*(functools.partial(do_run, s, run) for s in (first, second)))
        if not run:
            gather(1)
    rounds = service.servers[0].job._rounds
    service.until(lambda: rounds.position(0) == rounds.position(1) == 2)
    third.resume(2, 2)
    gather(2)
    assert metrics(third, 1, np.ones(1)).tolist() == [2]
    assert metrics(third, 2, np.ones(1)).tolist() == [2]


def test_who_skips_runs_stops_where_the_others_have_stopped(serve: Serve) -> None:
    """They are in the next training already when it comes to the end of the one before."""
    service = serve(3, b=1)
    first, second, third = service.sessions()

    def work(session: Session) -> None:
        for run in range(5):
            do_run(session, run)
            if run == 1:
                assert session.gather(pb.STOP, 2, 2, stop=session is first).stop

    service.together(*(functools.partial(work, s) for s in (first, second)))
    service.until(lambda: third.exchanges_of(4) is not None)
    third.resume(5, 5)
    service.together(*(functools.partial(do_run, s, 5) for s in (first, second)))
    service.until(lambda: third.exchanges_of(5) is not None)
    assert third.gather(pb.STOP, 2, 2).stop
    third.finish(5, 1, Fate.REPLAYED)
    service.until(lambda: not service.servers[0].job._gathers._results)


def test_who_asks_for_what_is_kept_no_more_does_not_wait(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathers, "_MOST_RESULT_BYTES", 0)
    service = serve(3, b=1)
    first, second, third = service.sessions()
    service.together(*(functools.partial(do_run, s, 0) for s in (first, second)))
    service.together(*(functools.partial(metrics, s, 1, np.ones(1)) for s in (first, second)))
    service.together(*(functools.partial(do_run, s, 1) for s in (first, second)))
    service.until(lambda: third.exchanges_of(1) is not None)
    third.resume(2, 2)
    # Whatever was told by then is thrown away with this.
    third._gathered.clear()
    assert metrics(third, 1, np.ones(1)).tolist() == [1]


def test_kinds_do_not_mix_and_nothing_stays(serve: Serve) -> None:
    service = serve(2)
    sessions = service.sessions()

    def work(session: Session) -> None:
        for fit in range(20):
            session.gather(pb.START, fit, fit, hashes=[fit])
            do_run(session, fit)
            assert metrics(session, fit + 1, np.full(1, fit)).tolist() == [2 * fit]
            stop = session.gather(pb.STOP, fit, fit + 1, stop=fit == session.config.worker)
            assert stop.stop == (fit < 2)
        assert not session._gathered
        do_run(session, 20)

    service.together(*(functools.partial(work, s) for s in sessions))
    job = service.servers[0].job
    relay = job._gathers
    service.until(lambda: not relay._results and not relay._gathers._gathers)
    assert not relay._totals


def test_what_others_gather_does_not_pile_up(serve: Serve) -> None:
    """One worker alone reads its metrics, run after run."""
    service = serve(2, b=1)
    first, second = service.sessions()

    def read(run: int) -> None:
        metrics(first, run, np.ones(1))
        do_run(first, run)

    for run in range(10):
        service.together(functools.partial(read, run), functools.partial(do_run, second, run))
    assert len(second._gathered) <= 2
