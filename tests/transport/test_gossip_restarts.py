"""The service of gossip workers is started again, and a worker comes as a new process meanwhile."""

import functools
from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.aggregation import recovery
from tf_syncdist.aggregation.server import AggregatorServer
from tf_syncdist.strategies import exchangers
from tf_syncdist.strategies.exchangers import GossipExchanger
from tf_syncdist.transport.peer_server import PeerServer

Serve = Callable[..., object]


def test_who_comes_before_a_service_knows_the_job_begins_with_a_partners_model(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the service has heard of all workers that were there, it names the job by itself."""
    monkeypatch.setattr(recovery, "GRACE_SECONDS", 2.0)
    monkeypatch.setattr(exchangers, "_GRACE_SECONDS", 0.3)
    service, opened = serve(3), []

    def worker(number: int) -> tuple[object, GossipExchanger]:
        server = PeerServer(number)
        session = service.session(number, serves=f"127.0.0.1:{server.port}")
        opened.append(GossipExchanger("pull", session, server, None, 10.0, lambda text: None))
        return session, opened[-1]

    def begin(exchanger: GossipExchanger, value: float) -> float:
        own = [np.full(2, value, "f4")]
        (found,), _ = exchanger.start([("v", "float32", (2,))], own, (1, 0))
        return float(found[0])

    try:
        sessions, workers = zip(*(worker(number) for number in range(3)), strict=True)
        begun = service.together(*(functools.partial(begin, w, i) for i, w in enumerate(workers)))
        assert begun == [0.0] * 3
        workers[0].exchange(1, [np.full(2, 7.0, "f4")])
        # Those that go while the service is away are waited for, when it is there again.
        port = service.servers[0].port
        service.servers[0].close(grace_seconds=0)
        for number in (1, 2):
            sessions[number].close()
            workers[number].close()
        service.servers[0] = AggregatorServer(port=port, on_event=service.events.append)
        session, again = worker(1)
        name = session.job_seed
        assert begin(again, 1.0) == 7.0
        assert session.job_seed != name
    finally:
        for exchanger in opened:
            exchanger.close()
