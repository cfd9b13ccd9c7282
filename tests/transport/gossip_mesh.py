"""Workers of a gossip without programs, and what the service would tell them."""

from collections.abc import Mapping

import numpy as np

from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.gossiping import Gossip
from tf_syncdist.transport.partners import Partners
from tf_syncdist.transport.peer_server import PeerServer

SHAPES = [(3, 5), (7,), ()]
SPECS = [(f"v{i}", "float32", shape) for i, shape in enumerate(SHAPES)]
SEED = 5
# Partners that answer at all are given so long.
PATIENCE_SECONDS = 30.0


def filled(value: float) -> list[np.ndarray]:
    """A model of one value."""
    return [np.full(int(np.prod(s)), value, "f4") for s in SHAPES]


def value_of(values: list[np.ndarray]) -> float:
    """The one value of a model; all parts of it must be of the same step."""
    (value,) = {float(x) for v in values for x in v}
    return value


class Peer:
    """One worker without a program."""

    def __init__(self, mesh: "Mesh", worker: int, mode: str, candidates: list[int]) -> None:
        self.notices: list[str] = []
        self.mesh = mesh
        self.worker = worker
        self.server = PeerServer(
            worker, credentials=mesh.credentials, on_heard=lambda w: self.partners.heard(w)
        )
        self.partners = Partners(
            worker, SEED, PATIENCE_SECONDS, mesh.credentials, self.notices.append
        )
        self.gossip = Gossip(
            mode,
            worker,
            candidates,
            self.server,
            self.partners,
            lambda: (mesh.live, mesh.done),
            1,
            lambda: mesh.all_have_come,
        )

    def start(
        self,
        value: float,
        specs: list = SPECS,
        seconds: float = PATIENCE_SECONDS,
        key: tuple[int, int] = (1, 0),
        is_first: bool = True,
    ) -> float:
        """Begins with a model and returns with which it really does."""
        model = filled(value) if specs is SPECS else [np.zeros(int(np.prod(specs[0][2])), "f4")]
        values, self.key = self.gossip.start(
            specs, model, SEED, seconds, lambda: None, is_first, key
        )
        return value_of(values)

    def exchange(self, step: int, value: float) -> float:
        """Mixes a model of one value."""
        return value_of(self.gossip.exchange(step, filled(value)))

    def wait_for_partners(self, seconds: float) -> None:
        """Gives partners so long from now on."""
        self.partners._timeout = seconds  # noqa: SLF001

    def close(self) -> None:
        """Ends it."""
        self.partners.close()
        self.server.close()


class Mesh:
    """Some workers, and what the service would tell them of each other."""

    def __init__(self) -> None:
        self.credentials = Credentials(token="a token")
        self.live: Mapping[int, str] = {}
        self.done: Mapping[int, str] = {}
        self.all_have_come = False
        self.peers: list[Peer] = []

    def add(self, worker: int, mode: str = "pull", candidates: list[int] | None = None) -> Peer:
        """Adds a worker, of three by default."""
        peer = Peer(self, worker, mode, [0, 1, 2] if candidates is None else candidates)
        self.peers.append(peer)
        self.live = {**self.live, worker: f"127.0.0.1:{peer.server.port}"}
        return peer


def drawn(peer: Peer, steps: int) -> list[int]:
    """The partners that a worker is going to draw, if all are there."""
    random = np.random.default_rng([1, peer.worker])
    return [int(random.integers(3)) for _ in range(steps)]
