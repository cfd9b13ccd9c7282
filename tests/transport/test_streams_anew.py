"""Streams that are opened anew: whose silence counts, and what is said again."""

import threading
import time
import types
from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.mixing.centre_policies import AsyncCentre, serialize
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import link, wire

Serve = Callable[..., object]


def test_the_silence_of_a_service_that_is_gone_breaks_no_stream_to_the_next_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_NEW_SECONDS", 60.0)
    service = serve(1)
    (session,) = service.sessions()

    def times_connected_again() -> int:
        return sum("is connected again" in notice for notice in service.notices[0])

    service.restart(0)
    service.until(times_connected_again)
    # A heartbeat that was sent to the former one, and is given up now.
    session._on_silence(0)
    assert session._connections[0]._call.is_active()
    session._welcomed_at[0] -= 60.0
    session._on_silence(0)
    service.until(lambda: times_connected_again() == 2)


def test_a_request_for_a_state_is_said_again_after_what_was_done_before_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this worker has done moves it on, and a request is about where it is."""
    service = serve(3)
    giver, receiver, _ = service.sessions()
    way = plan([TensorSpec("float32", (2,))], 100, 1)
    receiver.send(0, 0, way, [np.ones(2, "f4")])
    receiver.request_state(0, giver=0)
    service.until(giver.take_state_requests)
    said, post = [], receiver._post

    def note(shard: int, message: bytes | Callable[[], bytes]) -> None:
        data = message if isinstance(message, bytes) else message()
        said.append(wire.decode(pb.ToAggregator, data)[0].WhichOneof("body"))
        post(shard, data)

    monkeypatch.setattr(receiver, "_post", note)
    service.restart(0)
    service.until(giver.take_state_requests)
    assert said.count("contribution") == said.count("state_request") == 1
    assert said.index("contribution") < said.index("state_request")


def test_a_centre_that_is_given_while_the_first_shard_is_away_is_given_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(1, shards=2, centre=serialize(AsyncCentre()))
    (session,) = service.sessions()
    specs = [(f"v{i}", "float32", (4,)) for i in range(2)]
    way = plan([TensorSpec("float32", (4,))] * 2, 16, 2)
    assert all(way.num_slices)
    was_ready: list[bool] = []
    given_away, give = threading.Event(), session._give_centre

    def note(shard: int) -> None:
        if shard and not was_ready:
            session._connections[0].abandon()
            # The stream that breaks is seen to on its own thread, which needs this one's lock.
            session._changed.release()
            try:
                service.until(lambda: not session._ready[0])
            finally:
                session._changed.acquire()
        elif not shard:
            was_ready.append(session._ready[0])
            given_away.set()
        give(shard)

    monkeypatch.setattr(session, "_give_centre", note)
    # It comes back no sooner than the other shard has the centre.
    slow = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: given_away.wait(10))
    monkeypatch.setattr(link, "time", slow)
    values = [np.full(4, i, "f4") for i in range(2)]
    found, _ = session.open_centre(specs, way, values)
    assert was_ready == [False, True]
    assert [v.tobytes() for v in found] == [v.tobytes() for v in values]
