"""Stragglers, as their controllers take them through runs with a real service."""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.strategies.controller import Mode

Serve = Callable[..., object]

NO_HISTORY = {"history_rounds": 1, "history_bytes": 0}


def far_behind(serve: Serve, num_workers: int = 3, b: int = 1, **config: float) -> tuple:
    """A job in which the first N workers have done 9 runs, and the others have done one.

    Without history these have the results of runs 1 to 3 all the same, and know that 4 is gone.
    """
    service = serve(num_workers, b=b, **config)
    workers = service.workers()
    sites = [w.site() for w in workers]
    slow = workers[num_workers - b :]
    ahead = threading.Event()

    def work(worker: object, site: object) -> None:
        try:
            if worker in slow:
                worker.do_run(site, lambda: ahead.wait(60))
                return
            worker.do_runs(site, 9)
            for other in slow:
                service.until(lambda w=other: w.session.exchanges_of(8) is not None)
        finally:
            ahead.set()

    service.together(*(functools.partial(work, w, s) for w, s in zip(workers, sites, strict=True)))
    for worker in slow:
        assert worker.counts == (0, 1, 0, 0)
        assert not config or not worker.session.wait_results(4)
    return service, workers, sites


def equal(*workers: object) -> bool:
    """Whether workers have the same variables, bit for bit."""
    return len({w.bytes for w in workers}) == 1


def test_a_straggler_replays_what_it_missed_and_all_end_alike(serve: Serve) -> None:
    service, workers, sites = far_behind(serve)
    workers[2].do_runs(sites[2], 8)
    assert workers[2].modes == [Mode.COMPUTE] + [Mode.REPLAY] * 8
    assert [w.counts for w in workers] == [(9, 0, 0, 0), (9, 0, 0, 0), (0, 1, 8, 0)]
    assert [w.begun for w in workers] == [9] * 3
    assert equal(*workers)
    # Nobody is behind now, so the former straggler may be in time.
    service.together(*(functools.partial(w.do_run, s) for w, s in zip(workers, sites, strict=True)))
    assert equal(*workers)
    assert [sum(w.counts) for w in workers] == [10] * 3
    service.until(lambda: all(w.reported == w.counts for w in workers))


def test_a_straggler_without_history_takes_over_a_state_and_goes_on(serve: Serve) -> None:
    service, workers, sites = far_behind(serve, **NO_HISTORY)
    stop = threading.Event()
    service.together(
        functools.partial(workers[0].answer, stop),
        functools.partial(workers[1].answer, stop),
        lambda: (workers[2].do_runs(sites[2], 8), stop.set()),
    )
    assert workers[2].modes == [Mode.COMPUTE] + [Mode.REPLAY] * 3 + [Mode.SKIP] * 5
    assert workers[2].counts == (0, 1, 8, 5)
    assert workers[2].controller.report().rounds == 9
    (notice,) = workers[2].notices
    assert "worker 2" in notice and "round 4" in notice and "round 9" in notice
    assert equal(*workers)
    service.together(
        *(functools.partial(w.do_runs, s, 3) for w, s in zip(workers, sites, strict=True))
    )
    assert equal(*workers)
    service.until(lambda: all(w.reported == w.counts for w in workers))


def test_a_straggler_that_replays_quickly_may_learn_late_that_results_are_gone(
    serve: Serve,
) -> None:
    """It has runs 0 to 3 and replays them before the service can tell it that run 4 is gone."""
    service = serve(2, b=1, **NO_HISTORY)
    fast, slow = service.workers()
    ahead, stop = threading.Event(), threading.Event()
    site = slow.site()

    def lead() -> None:
        fast.do_runs(fast.site(), 9)
        service.until(lambda: slow.session.exchanges_of(8) is not None)
        with service.servers[0].job._lock:  # The service is slow to answer.
            ahead.set()
            time.sleep(0.3)
        fast.answer(stop)

    def follow() -> None:
        slow.do_run(site, lambda: ahead.wait(60))
        slow.do_runs(site, 8)
        stop.set()

    service.together(lead, follow)
    assert slow.counts == (0, 1, 8, 5) and equal(fast, slow)


@contextlib.contextmanager
def slow_uplink(address: str) -> Iterator[tuple[str, threading.Event]]:
    """A relay to a service; what is sent to the service waits while the event is not set."""
    host, _, port = address.rpartition(":")
    flows = threading.Event()
    flows.set()

    def pump(source: socket.socket, sink: socket.socket, may_flow: threading.Event | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if may_flow is not None:
                    may_flow.wait(60)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as sockets:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = sockets.enter_context(server.accept()[0])
                    service = sockets.enter_context(socket.create_connection((host, int(port))))
                    for pair in ((client, service, flows), (service, client, None)):
                        threading.Thread(target=pump, args=pair, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", flows
        flows.set()


def test_a_worker_whose_messages_lag_behind_its_runs_survives(serve: Serve) -> None:
    """While it computes run 5, the service takes it to be in run 1, and forgets run 5."""
    service = serve(2, b=1, **NO_HISTORY)
    with slow_uplink(service.config.addresses[0]) as (address, flows):
        fast = service.worker(0)
        slow = service.worker(1, addresses=(address,))
        sites = fast.site(), slow.site()
        service.together(lambda: fast.do_run(sites[0]), lambda: slow.do_run(sites[1]))
        service.until(lambda: sum(slow.reported) == 1)
        flows.clear()
        for _ in range(4):
            begun = threading.Event()
            service.together(
                lambda e=begun: slow.do_run(sites[1], e.set),
                lambda e=begun: (e.wait(30), fast.do_run(sites[0])),
            )
        stop = threading.Event()

        def fall_behind() -> None:
            fast.do_runs(sites[0], 6)
            service.until(lambda: slow.session.exchanges_of(10) is not None)
            flows.set()

        def catch_up() -> None:
            try:
                slow.do_run(sites[1], fall_behind)
                slow.do_runs(sites[1], 5)
            finally:
                flows.set()
                stop.set()

        service.together(catch_up, lambda: (flows.wait(60), fast.answer(stop)))
    assert equal(fast, slow)


def test_a_straggler_gets_the_state_of_workers_that_wait_for_its_next_model(serve: Serve) -> None:
    """All workers meet before a new model is trained; the one behind must get there first."""
    service, workers, sites = far_behind(serve, 2, **NO_HISTORY)

    def go_on(worker: object, site: object) -> None:
        worker.do_runs(site, 9 - worker.controller.run)
        worker.do_run(worker.site("a", "b"))

    service.together(*(functools.partial(go_on, w, s) for w, s in zip(workers, sites, strict=True)))
    assert equal(*workers) and len(workers[0].store.read()) == 2


def test_a_straggler_gets_the_state_of_a_worker_whose_round_waits_for_it(serve: Serve) -> None:
    """Once another worker is lost, the round in progress does without the one that is behind."""
    service, (giver, lost, slow), sites = far_behind(serve, 3, **NO_HISTORY)
    lost.session.close()
    stop = threading.Event()

    def catch_up() -> None:
        try:
            slow.do_runs(sites[2], 9)
        finally:
            stop.set()

    service.together(lambda: (giver.do_run(sites[0]), giver.answer(stop)), catch_up)
    assert giver.controller.run == slow.controller.run == 10
    assert equal(giver, slow)


def test_a_worker_that_skips_rounds_gives_its_state_as_what_it_is(serve: Serve) -> None:
    """It has the variables of round 9 already while it passes over round 5."""
    service, (ahead, skipping, slow), sites = far_behind(serve, 3, b=2, **NO_HISTORY)
    for giver, receiver, site in [(ahead, skipping, sites[1]), (skipping, slow, sites[2])]:
        stop = threading.Event()
        service.together(
            functools.partial(giver.answer, stop),
            lambda w=receiver, s=site, e=stop: (w.do_runs(s, 4), e.set()),
        )
        service.until(lambda w=receiver: w.reported[3] > 1)
        ahead.session.close()
    assert equal(ahead, skipping, slow)
    assert [w.notices[0].count("state of round 9") for w in (skipping, slow)] == [1, 1]


def test_a_worker_late_in_some_slices_still_takes_part_in_the_next_exchange(serve: Serve) -> None:
    """Else nobody might be left to close it: here the third worker has sent one slice only."""
    service = serve(3, b=1)
    first, second, third = service.workers()
    way = plan([TensorSpec("float32", (3, 5))], 24, 1)
    (bucket,) = way.buckets
    some = way._replace(buckets=(bucket._replace(slices=bucket.slices[:1]),))
    third.session.send(0, 0, some, [np.ones((3, 5), "f4")])
    service.until(lambda: third.session.report().workers[2].delays)
    sites = [w.site() for w in (first, second)]
    for site in sites:
        site.synchronised = True
    service.together(
        lambda: first.do_run(sites[0], exchanges=2), lambda: second.do_run(sites[1], exchanges=2)
    )
    assert sorted(w.counts for w in (first, second)) == [(0, 1, 0, 0), (1, 0, 0, 0)]


def test_a_site_that_cannot_be_replayed_runs_with_the_stored_results(serve: Serve) -> None:
    service, workers, sites = far_behind(serve, 2)
    sites[1].replayable = False
    computed = []
    for _ in range(8):
        workers[1].do_run(sites[1], lambda: computed.append(1))
    assert len(computed) == 8 and set(workers[1].modes) == {Mode.COMPUTE}
    assert workers[1].counts == (0, 1, 8, 0)
    assert equal(*workers)
    service.until(lambda: workers[1].reported == (0, 1, 8, 0))
