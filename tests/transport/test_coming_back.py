"""Workers that come back to a job, and services that are started again."""

import functools
import re
import threading
from collections.abc import Callable

import pytest

from tf_syncdist.aggregation import recovery, waits
from tf_syncdist.aggregation.records import SliceKey
from tf_syncdist.aggregation.server import AggregatorServer
from tf_syncdist.errors import ServiceError
from tf_syncdist.propagation.slices import TensorSpec
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies.controller import Mode
from tf_syncdist.transport import link

SHAPE = (3, 5)

Serve = Callable[..., object]


def test_a_new_process_takes_over_a_state_and_goes_on(serve: Serve) -> None:
    service = serve(3)
    workers = service.workers()
    sites = [w.site() for w in workers]
    service.together(
        *(functools.partial(w.do_runs, s, 4) for w, s in zip(workers, sites, strict=True))
    )
    workers[2].session.close()
    service.until(lambda: any("worker 2 is gone" in n for n in service.notices[0]))
    service.together(
        *(functools.partial(w.do_runs, s, 6) for w, s in zip(workers[:2], sites, strict=False))
    )
    late = service.worker(2)
    started = late.session.wait_started()
    assert started.in_progress and started.run == 10
    late.controller.start_at(8)
    site = late.site()
    stop = threading.Event()
    done = threading.Thread(target=workers[0].answer, args=(stop,))
    done.start()
    late.do_runs(site, 2)
    stop.set()
    done.join(30)
    assert late.modes == [Mode.SKIP, Mode.SKIP]
    assert late.bytes == workers[0].bytes == workers[1].bytes
    everybody, rounds = [*workers[:2], late], service.servers[0].job._rounds
    for _ in range(5):
        service.together(
            *(
                functools.partial(w.do_run, s)
                for w, s in zip(everybody, [*sites[:2], site], strict=True)
            )
        )
        # Nobody waits for it before it is heard of in a round.
        service.until(lambda: rounds.position(2) == late.controller.run)
    assert late.bytes == workers[0].bytes == workers[1].bytes
    contributed, late_ones, replayed, missed = late.counts
    assert contributed + late_ones + replayed == 15 and missed == 10 and contributed > 0


def test_a_process_that_was_followed_by_another_is_refused(serve: Serve) -> None:
    service = serve(2, detection_seconds=0.4)
    first, second = service.sessions()
    second._heartbeats[0].close()  # As if the process were stopped.
    service.until(lambda: any("worker 1 is silent" in n for n in service.notices[0]))
    anew = service.session(1)
    service.until(lambda: second.has_failed)
    with pytest.raises(ServiceError, match="ABORTED.*followed by another"):
        second.exchanges_of(0)
    assert not anew.has_failed and not first.has_failed


def test_a_silent_worker_is_not_waited_for_until_it_is_heard_of(
    serve: Serve, heard_of: set[int]
) -> None:
    heard_of |= {0, 1}
    service = serve(2, detection_seconds=0.4)
    workers = service.workers()
    sites = [w.site() for w in workers]
    service.together(
        *(functools.partial(w.do_runs, s, 3) for w, s in zip(workers, sites, strict=True))
    )
    beat = workers[1].session._heartbeats[0]
    beat.close()
    heard_of.remove(1)
    workers[0].do_runs(sites[0], 3)
    assert any("worker 1 is silent" in n for n in service.notices[0])
    workers[1].do_runs(sites[1], 3)
    assert sum(workers[1].counts[1:3]) == 3 and workers[0].counts == (6, 0, 0, 0)
    assert workers[0].bytes == workers[1].bytes


@pytest.mark.parametrize("b", [0, 1])
def test_a_worker_that_comes_late_to_a_service_that_was_started_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, b: int
) -> None:
    """It may have results that were computed anew, so it takes over a state."""
    monkeypatch.setattr(recovery, "GRACE_SECONDS", 60.0)
    service = serve(3, b=b, transport="grpc")
    workers = service.workers()
    everybody = [(w, w.site("a", "b")) for w in workers]
    service.together(*(functools.partial(w.do_runs, s, 3) for w, s in everybody))
    late = workers[2].session
    connection = late._connections[0]
    come_back = connection._on_error
    waited = threading.Event()
    connection._on_error = lambda *error: (waited.wait(60), come_back(*error))
    # It has one of two slices of the open round before it is cut off.
    way = workers[2].controller.plan([TensorSpec("float32", SHAPE)] * 2)
    key = SliceKey(3, 0, 0)
    result = pb.Result(run=3, num_slices=len(way.slices), dtype=pb.FLOAT32, contributors=[0, 1, 2])
    with late._changed:
        late._on_result(0, result, memoryview(bytes(way.slices[0].nbytes)))
    assert late._held[0][key.run]
    seen = len(service.events)
    service.restart(0)
    joined = re.compile(r"worker [01] joined")
    service.until(lambda: sum(map(bool, map(joined.match, service.events[seen:]))) == 2)
    monkeypatch.setattr(recovery, "GRACE_SECONDS", 1.0)
    done = threading.Event()
    answering = threading.Thread(target=workers[0].answer, args=(done,))
    service.together(*(functools.partial(w.do_runs, s, 4) for w, s in everybody[:2]))
    answering.start()
    waited.set()
    service.until(lambda: "connected again" in " ".join(service.notices[2]))
    workers[2].do_runs(everybody[2][1], 4)
    done.set()
    answering.join(30)
    assert len({w.bytes for w in workers}) == 1
    assert workers[2].counts[3] > 0


def test_below_min_workers_all_wait_and_say_for_whom(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "_NOTICE_SECONDS", 0.5)
    service = serve(3, min_workers=2, address="127.0.0.1:5001")
    workers = service.workers()
    sites = [w.site() for w in workers]
    everybody = list(zip(workers, sites, strict=True))
    service.together(*(functools.partial(w.do_runs, s, 2) for w, s in everybody))
    workers[2].session.close()
    service.together(*(functools.partial(w.do_runs, s, 2) for w, s in everybody[:2]))
    workers[1].session.close()
    waiting = threading.Thread(target=workers[0].do_runs, args=(sites[0], 2))
    waiting.start()
    names = r"worker 1 \(127.0.0.1:5001, last seen \d+ s ago\), worker 2 \(127"
    line = re.compile(rf"round 4: 1 of 3 contributions after \d+ s; waiting for {names}")
    service.until(lambda: any(map(line.search, service.notices[0])))
    assert waiting.is_alive()
    late = service.worker(2)
    late.do_runs(late.site(), 6)
    waiting.join(30)
    assert late.bytes == workers[0].bytes


@pytest.mark.parametrize(
    "shards, b, transport", [(1, 0, "auto"), (1, 1, "grpc"), (2, 0, "grpc"), (2, 1, "auto")]
)
def test_a_service_that_is_started_again_goes_on_where_it_was(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, b: int, shards: int, transport: str
) -> None:
    monkeypatch.setattr(recovery, "GRACE_SECONDS", 30.0)  # All are to come back.
    service = serve(3, b=b, shards=shards, transport=transport)
    workers = service.workers()
    sites = [w.site("a", "b") for w in workers]
    stop = threading.Event()

    thread = threading.Thread(target=service.keep_restarting, args=(stop, b))
    thread.start()
    count = 200

    def work(worker: object, site: object) -> None:
        worker.do_runs(site, count // 2)
        service.until(lambda: service.restarts)
        worker.do_runs(site, count // 2)

    try:
        service.together(
            *(functools.partial(work, w, s) for w, s in zip(workers, sites, strict=True))
        )
    finally:
        stop.set()
        thread.join(60)
    assert len({w.bytes for w in workers}) == 1
    assert any("connected again" in n for n in service.notices[0])
    for worker in workers:
        assert sum(worker.counts[:3]) == count
        if not b:
            assert worker.counts == (count, 0, 0, 0)


def test_a_stream_to_any_of_several_shards_may_break(serve: Serve) -> None:
    service = serve(2, shards=3)
    workers = service.workers()
    everybody = [(w, w.site("a", "b")) for w in workers]
    for shard in (2, 0, 1):
        service.together(*(functools.partial(w.do_runs, s, 3) for w, s in everybody))
        # Its processes still know the job, each by a seed of its own.
        workers[1].session._connections[shard].abandon()
        address = service.config.addresses[shard]
        again = f"worker 1 is connected again to the service at {address}"
        service.until(lambda text=again: text in service.notices[1])
    service.together(*(functools.partial(w.do_runs, s, 3) for w, s in everybody))
    assert workers[0].bytes == workers[1].bytes
    assert [w.counts for w in workers] == [(12, 0, 0, 0)] * 2


def test_who_leaves_while_the_service_is_away_is_not_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, connect = serve(2), link.Connection
    first, second = service.sessions()
    looking: list[object] = []

    def look(address: str, on_message: functools.partial, *args: object) -> object:
        looking.append(on_message.func.__self__)
        return connect(address, on_message, *args)

    monkeypatch.setattr(link, "Connection", look)
    first.wait_started(), second.wait_started()
    port = service.servers[0].port
    service.servers[0].close(grace_seconds=0)
    service.until(lambda: first in looking and second in looking)
    first.goodbye(pb.FINISHED, 0)
    service.servers[0] = AggregatorServer(port=port, on_event=service.events.append)
    service.until(lambda: any("worker 0 left" in e for e in service.events))
    second.goodbye(pb.FINISHED, 0)
    assert service.together(
        *(functools.partial(s.wait_all_gone, 30.0, lambda: None) for s in (first, second))
    ) == [True, True]
