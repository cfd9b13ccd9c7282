"""With which model a worker begins, where workers serve their models to one another."""

import collections
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tf_syncdist.errors import ModelMismatchError, WaitTimeoutError
from tf_syncdist.transport import gossiping
from tf_syncdist.transport.models import Model, ModelFormat

from .gossip_mesh import PATIENCE_SECONDS, SEED, SPECS, Mesh, Peer, filled


class Clock:
    """Stands in for `time` where workers look around: it goes on by the test's word only."""

    def __init__(self) -> None:
        self._now = 0.0
        self._looks: collections.Counter[int] = collections.Counter()

    def monotonic(self) -> float:
        """Returns the time in seconds."""
        return self._now

    def sleep(self, _: float) -> None:
        """Takes note that a worker has looked around."""
        self._looks[threading.get_ident()] += 1
        time.sleep(0.01)

    def go_on(self, seconds: float, threads: list[threading.Thread]) -> None:
        """Lets time pass, and waits until workers that have not begun yet have seen what is new."""
        self._now += seconds
        before = self._looks.copy()
        # The look that is in progress may have begun before.
        while any(t.is_alive() and self._looks[t.ident] < before[t.ident] + 2 for t in threads):
            time.sleep(0.01)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    """A mesh without workers, which wait for one another as long as it takes."""
    monkeypatch.setattr(gossiping, "_BEGIN_SECONDS", PATIENCE_SECONDS)
    mesh = Mesh()
    yield mesh
    for peer in mesh.peers:
        peer.close()


def test_who_comes_again_does_not_begin_anew_because_the_others_are_busy(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = mesh.add(1)
    address = mesh.live[1]
    one.server.begin(SEED, ModelFormat(SPECS, SEED, 1, (1, 0)))
    one.server.publish(Model(30, filled(9.0)))
    silent = socket.create_server(("127.0.0.1", 0))
    mesh.live = {1: f"127.0.0.1:{silent.getsockname()[1]}"}

    zero = mesh.add(0)
    zero.wait_for_partners(0.5)

    def answer() -> None:
        while not zero.notices:
            time.sleep(0.01)
        time.sleep(0.5)
        zero.wait_for_partners(PATIENCE_SECONDS)
        mesh.live = {**mesh.live, 1: address}

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    assert zero.start(1.0, seconds=60.0) == 9.0
    thread.join()
    # Who does not answer at all is not waited for.
    mesh.live = {1: f"127.0.0.1:{silent.getsockname()[1]}"}
    monkeypatch.setattr(gossiping, "_BEGIN_SECONDS", 2.0)
    begun = time.monotonic()
    again = mesh.add(0)
    again.wait_for_partners(0.5)
    assert again.start(1.0, seconds=60.0) == 1.0
    assert 1.9 < time.monotonic() - begun < 20
    silent.close()


def test_all_begin_with_worker_0_and_late_ones_with_a_partner(mesh: Mesh) -> None:
    one = mesh.add(1)
    begun: list[float] = []
    thread = threading.Thread(target=lambda: begun.append(one.start(11.0)))
    thread.start()
    time.sleep(0.3)
    assert not begun
    zero = mesh.add(0)
    assert zero.start(7.0) == 7.0
    thread.join(PATIENCE_SECONDS)
    assert begun == [7.0]
    one.gossip.exchange(6, filled(9.0))
    zero.gossip.exchange(5, filled(8.0))
    assert mesh.add(2).start(3.0) == 9.0
    # Worker 0 too, if it is another process of it.
    zero.close()
    again = Peer(mesh, 0, "pull", [0, 1, 2])
    mesh.peers.append(again)
    assert again.start(7.0) == 9.0


def test_who_comes_when_all_others_have_ended_begins_where_they_have_come_to(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mesh.add(0)
    first.start(7.0)
    first.server.publish(Model(50, filled(9.0)))
    mesh.done, mesh.live = dict(mesh.live), {}
    assert mesh.add(1).start(1.0) == 9.0
    # While anybody takes part, those that have ended are not looked at.
    first.server.publish(Model(60, filled(11.0)))
    assert mesh.add(2).start(1.0) == 9.0
    # Those that take part may be as new as this one.
    new = Mesh()
    new.done = mesh.done
    assert [new.add(w).start(1.0) for w in (1, 2)] == [11.0, 11.0]
    for peer in new.peers:
        peer.close()
    first.close()
    mesh.live = {}
    monkeypatch.setattr(gossiping, "_BEGIN_SECONDS", 2.0)
    begun = time.monotonic()
    with pytest.raises(WaitTimeoutError, match="came when all others had ended"):
        mesh.add(1).start(1.0, seconds=60.0)
    assert time.monotonic() - begun < 20


def test_nobody_to_begin_with_is_an_error(mesh: Mesh) -> None:
    with pytest.raises(WaitTimeoutError, match="a model to begin with"):
        mesh.add(1).start(1.0, seconds=0.3)


def test_the_lowest_begins_if_worker_0_has_gone_before_its_first_step(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 0 takes part in what the others train, if it comes again."""
    clock = Clock()
    monkeypatch.setattr(gossiping, "time", clock)
    monkeypatch.setattr(gossiping, "_BEGIN_SECONDS", 2.0)
    peers = [mesh.add(w) for w in (1, 2)]
    found: list[float] = []

    def begin(peer: Peer) -> None:
        found.append(peer.start(float(peer.worker), seconds=60.0))

    mesh.all_have_come = True
    threads = [threading.Thread(target=begin, args=(p,)) for p in peers]
    for thread in threads:
        thread.start()
    clock.go_on(0.0, threads)
    clock.go_on(1.0, threads)
    # A service that is started again does not know for a moment who is there.
    known, mesh.live = mesh.live, {**mesh.live, 0: "127.0.0.1:1"}
    clock.go_on(0.3, threads)
    mesh.live = known
    clock.go_on(0.0, threads)
    clock.go_on(1.9, threads)
    assert not found
    clock.go_on(0.2, threads)
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert found == [1.0, 1.0]
    assert [p.gossip.began_alone for p in peers] == [True, False]
    assert mesh.add(0).start(0.0) == 1.0


def test_other_variables_are_an_error_that_names_the_first(mesh: Mesh) -> None:
    mesh.add(0).start(0.0)
    match = r"variable 0 is w \(float32, shape \[4\]\) on worker 1 and v0 \(float32, shape \[3, 5\]"
    with pytest.raises(ModelMismatchError, match=match):
        mesh.add(1).start(0.0, [("w", "float32", (4,))])


def test_who_comes_late_takes_part_in_the_training_of_the_others(mesh: Mesh) -> None:
    zero = mesh.add(0)
    zero.start(7.0)
    assert zero.start(5.0, key=(3, 2), is_first=False) == 5.0
    late = mesh.add(1)
    assert late.start(1.0) == 5.0 and late.key == (3, 2)
    assert late.gossip.average(1, filled(6.0))[0][0] == 5.5
    assert late.gossip.average(2, filled(100.0), in_step=True)[0][0] == 5.5


def test_a_later_training_begins_with_one_model(mesh: Mesh) -> None:
    """Whoever comes to it first, and if all come at once."""
    peers = [mesh.add(w) for w in range(3)]
    for peer in peers:
        peer.start(0.0)
    assert peers[2].start(12.0, key=(2, 0), is_first=False) == 12.0
    assert [p.start(10.0 + p.worker, key=(2, 0), is_first=False) for p in peers[:2]] == [12.0] * 2
    for revision in range(1, 60):
        begun: dict[int, float] = {}

        def begin(peer: Peer, revision: int = revision, begun: dict = begun) -> None:
            # In another order every time.
            time.sleep((revision + peer.worker) % 3 * 0.001)
            value = 10.0 + peer.worker
            begun[peer.worker] = peer.start(value, key=(2, revision), is_first=False)

        threads = [threading.Thread(target=begin, args=(p,)) for p in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert len(begun) == 3 and len(set(begun.values())) == 1, begun


def test_a_worker_does_not_wait_for_a_training_that_is_over(mesh: Mesh) -> None:
    zero = mesh.add(0)
    zero.start(0.0)
    zero.start(0.0, [("w", "float32", (4,))], key=(2, 0), is_first=False)
    one = mesh.add(1)
    assert one.start(8.0) == 8.0 and one.key == (1, 0)
