"""What exchangers tell the user."""

from types import SimpleNamespace

import numpy as np
import pytest

from tf_syncdist.strategies.exchangers import GossipExchanger
from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.peer_server import PeerServer


@pytest.mark.parametrize("again", [False, True])
def test_gossip_says_if_the_model_of_a_job_in_progress_is_lost(again: bool) -> None:
    """All workers have died and come again, while the service lives on."""
    notices: list[str] = []
    with PeerServer(0, "127.0.0.1", 0) as server:
        session = SimpleNamespace(
            config=SimpleNamespace(
                worker=0, num_workers=2, credentials=Credentials(), timeout_seconds=20.0
            ),
            job_seed=5,
            served_at=({0: f"127.0.0.1:{server.port}"}, {}),
            came_again=object() if again else None,
            has_started=lambda: True,
            check=lambda: None,
        )
        exchanger = GossipExchanger("pull", session, server, None, 1.0, notices.append)
        for key in ((1, 0), (1, 1)):
            values, _ = exchanger.start([("v", "float32", (2,))], [np.ones(2, "f4")], key)
            assert values[0].tolist() == [1.0, 1.0]
        exchanger.close()
    # Once: what is written later is no loss.
    assert len(notices) == again
    assert not again or "no worker has a model of this job" in notices[0]
