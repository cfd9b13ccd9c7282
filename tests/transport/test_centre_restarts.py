"""The service of a centre is started again: the workers have what it held."""

import functools
import threading
import time

import numpy as np
import pytest

from tf_syncdist.aggregation import attendance, recovery
from tf_syncdist.mixing.centre_policies import AsyncCentre, serialize
from tf_syncdist.transport.session import Session

from .test_centre import SPECS, Serve, cut, model, opened, same


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services that are started again wait for workers that have no turn for seconds."""
    for module in (attendance, recovery):
        monkeypatch.setattr(module, "GRACE_SECONDS", 30.0)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_service_that_is_started_again_gets_the_newest_centre(serve: Serve, shards: int) -> None:
    service = serve(3, shards=shards, centre=serialize(AsyncCentre()))
    sessions, way = service.sessions(), cut(shards)
    opened(service, sessions, way)
    one = [np.ones_like(v) for v in model(0)]
    for session in (*sessions, sessions[1]):
        session.mix(one)
    newest = [v.copy() for v in sessions[1].read_centre()]
    for shard in range(shards):
        service.restart(shard)
    now, _ = sessions[0].mix(one)
    assert same(now, [v + 1 for v in newest])
    assert same(sessions[2].read_centre(), now)


def test_services_are_started_again_and_again(serve: Serve) -> None:
    """The centre may lose what nobody has received, and nothing else; it never has nonsense."""
    service = serve(3, shards=2, centre=serialize(AsyncCentre()))
    sessions, way = service.sessions(), cut(2)
    opened(service, sessions, way)
    stop = threading.Event()
    counts = [0, 0, 0]

    def work(session: Session) -> None:
        me = session.config.worker
        one = [np.ones_like(v) for v in model(0)]
        start = model(0)
        while not stop.is_set():
            now, _ = session.mix(one)
            counts[me] += 1
            grown = np.concatenate([n - s for n, s in zip(now, start, strict=True)])
            assert np.all(grown > 0.5) and np.all(grown < sum(counts) + 3.5)
            time.sleep(0.002)

    def restart() -> None:
        try:
            service.keep_restarting(stop, seed=3, times=5)
            time.sleep(0.5)
            before = list(counts)
            service.until(lambda: all(c > b for c, b in zip(counts, before, strict=True)))
        finally:
            stop.set()

    service.together(restart, *(functools.partial(work, s) for s in sessions))


def test_the_newest_centre_is_not_lost_where_its_holder_is_away_for_a_moment(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream breaks once more when the service has just been started again."""
    service = serve(2, centre=serialize(AsyncCentre()))
    sessions = service.sessions()
    opened(service, sessions, cut())
    holder = sessions[1]
    monkeypatch.setattr(sessions[0], "_centre_versions", [[None] * cut().num_slices[0]])
    for _ in range(3):
        newest, _ = holder.mix([np.ones_like(v) for v in model(0)])
    expected = [v.copy() for v in newest]
    breaks, give = iter([True]), holder._give_centre

    def give_or_break(shard: int) -> None:
        if next(breaks, False):
            holder._connections[shard].abandon()
        else:
            give(shard)

    monkeypatch.setattr(holder, "_give_centre", give_or_break)
    service.restart(0)
    for found in service.together(*(s.read_centre for s in sessions)):
        assert same(found, expected)


def test_another_one_gives_the_centre_where_its_holder_comes_back_as_a_new_process(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(2, shards=2, centre=serialize(AsyncCentre()))
    first, holder = service.sessions()
    way, asked = cut(2), threading.Event()
    opened(service, [first, holder], way)
    expected = [v.copy() for v in first.mix([np.ones_like(v) for v in model(0)])[0]]
    holder.mix([np.ones_like(v) for v in model(0)])
    monkeypatch.setattr(holder, "_give_centre", lambda shard: asked.set())
    for shard in range(2):
        service.restart(shard)
    assert asked.wait(20)
    holder.close()
    service.until(lambda: all(1 not in s.job._streams for s in service.servers))  # noqa: SLF001
    again = service.session(1)

    def begin() -> list[np.ndarray]:
        return again.open_centre(SPECS, way, model(1), (0, 0))[0]

    for found in service.together(first.read_centre, begin):
        assert same(found, expected)


def test_a_shard_that_is_lost_while_a_centre_is_given_asks_the_same_worker_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(2, shards=2, centre=serialize(AsyncCentre()))
    first, second = sessions = service.sessions()
    way, asked, give = cut(2), threading.Event(), second._give_centre
    opened(service, sessions, way)
    # What it gives for the first time is lost with the service.
    monkeypatch.setattr(
        second, "_give_centre", lambda shard: give(shard) if asked.is_set() else asked.set()
    )

    def begin(session: Session) -> list[np.ndarray]:
        if session is first:
            assert asked.wait(10)
            service.restart(1)
        values = model(10 + session.config.worker)
        found, _ = session.open_centre(SPECS, way, values, (1, 0), joins=False)
        return [v.copy() for v in found]

    for found in service.together(*(functools.partial(begin, s) for s in sessions)):
        assert same(found, model(11))
