"""Workers serve their models to one another: rules, snapshots, dead partners, interrupts."""

import functools
import itertools
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tf_syncdist.proto import tf_syncdist_peers_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.models import Model, ModelFormat, Refusal
from tf_syncdist.transport.partners import Partners
from tf_syncdist.transport.peer_server import PeerServer

from .gossip_mesh import PATIENCE_SECONDS, SEED, SPECS, Mesh, drawn, filled, value_of


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """A mesh without workers."""
    mesh = Mesh()
    yield mesh
    for peer in mesh.peers:
        peer.close()


def test_pull_averages_with_what_the_partner_has_shown(mesh: Mesh) -> None:
    peers = [mesh.add(w) for w in range(3)]
    assert [p.start(10.0 * p.worker) for p in peers] == [0.0, 0.0, 0.0]
    for peer in peers[1:]:
        peer.server.publish(Model(4, filled(100.0 * peer.worker)))
    shown = {1: 100.0, 2: 200.0}
    for step, partner in enumerate(drawn(peers[0], 12), start=1):
        mine = float(step)
        expected = mine if partner == 0 else (mine + shown[partner]) / 2
        assert peers[0].exchange(step, mine) == expected
        # What was mixed is not shown before the next exchange.
        assert value_of(peers[1].partners.pull(0, peers[1].gossip._models).values) == mine
    counts = peers[0].gossip.counts
    assert counts.exchanges == 12 and counts.with_itself == drawn(peers[0], 12).count(0)
    assert counts.mixed == 12 - counts.with_itself and not counts.failed
    assert counts.staleness_max == 8


def test_push_counts_all_that_has_come_and_a_self_draw_twice(mesh: Mesh) -> None:
    peers = [mesh.add(w, "push") for w in range(3)]
    for peer in peers:
        peer.start(0.0)
    inboxes: dict[int, list[float]] = {0: [], 1: [], 2: []}
    draws = {p.worker: drawn(p, 15) for p in peers}
    doubled = 0
    for step in range(15):
        for peer in peers:
            mine = float(peer.worker + 10 * step)
            partner = draws[peer.worker][step]
            if partner != peer.worker:
                inboxes[partner].append(mine)
            come, inboxes[peer.worker] = inboxes[peer.worker], []
            weight = 2 if partner == peer.worker else 1
            doubled += weight == 2 and bool(come)
            expected = (sum(come) + weight * mine) / (len(come) + weight) if come else mine
            assert peer.exchange(step, mine) == pytest.approx(expected, rel=1e-6)
    assert doubled


def test_a_snapshot_is_never_torn(mesh: Mesh) -> None:
    shapes = [(1000, 1000), (500, 700)]
    specs = [(f"v{i}", "float32", s) for i, s in enumerate(shapes)]
    server, reader = mesh.add(0), mesh.add(1)
    models = ModelFormat(specs, SEED, 0)
    assert models.nbytes > 2 * 2**20
    server.server.begin(SEED, models)
    reader.partners.update(mesh.live)
    stop = threading.Event()

    def publish() -> None:
        for step in itertools.count():
            server.server.publish(Model(step, [np.full(np.prod(s), step, "f4") for s in shapes]))
            if stop.is_set():
                return

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        seen = []
        while len(seen) < 25 or seen[-1] == seen[0]:
            model = reader.partners.pull(0, models)
            if model is not None:
                assert value_of([v[::1000] for v in model.values]) == model.step
                seen.append(model.step)
    finally:
        stop.set()
        thread.join(20)
    assert seen == sorted(seen)


def test_what_is_pushed_at_the_same_time_is_counted_once(mesh: Mesh) -> None:
    peers = [mesh.add(w, "push") for w in range(3)]
    for peer in peers:
        peer.start(0.0)
    parts = [p.server.publish(Model(1, filled(1.0))) for p in peers]
    peers[0].server.take_pushed()
    taken = total = 0

    def push(worker: int) -> None:
        for _ in range(40):
            assert peers[worker].partners.push(0, peers[worker].gossip._models, parts[worker])

    threads = [threading.Thread(target=push, args=(w,)) for w in (1, 2)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads) or peers[0].server._pushed.count:
        pushed = peers[0].server.take_pushed()
        taken += pushed.count
        total += value_of([i.total for i in pushed.inboxes]) if pushed.count else 0
    assert taken == total == 80


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_a_dead_partner_costs_a_deadline_once(mesh: Mesh, mode: str) -> None:
    peers = [mesh.add(w, mode) for w in range(3)]
    for peer in peers:
        peer.start(0.0)
    # A port that takes connections and never answers.
    silent = socket.create_server(("127.0.0.1", 0))
    mesh.live = {**mesh.live, 2: f"127.0.0.1:{silent.getsockname()[1]}"}
    first = drawn(peers[0], 40).index(2)
    for step in range(40):
        # The others are not to be blamed if they are slow.
        peers[0].wait_for_partners(0.5 if step == first else PATIENCE_SECONDS)
        begun = time.monotonic()
        peers[0].exchange(step, 1.0)
        if step == first:
            assert 0.4 < time.monotonic() - begun < 20
        assert peers[0].gossip.counts.failed == (step >= first)
    assert len(peers[0].notices) == 1 and "worker 2" in peers[0].notices[0]
    # The service says that there is another process now.
    mesh.live = {**mesh.live, 2: f"127.0.0.1:{peers[2].server.port}"}
    mixed, pushed = peers[0].gossip.counts.mixed, peers[2].server.take_pushed().count
    for step in range(40, 80):
        peers[0].exchange(step, 1.0)
    counts = peers[0].gossip.counts
    assert counts.failed == 1
    if mode == "pull":
        assert counts.mixed - mixed > 15
    else:
        assert peers[2].server.take_pushed().count > pushed + 5
    silent.close()


def test_who_answers_greetings_again_is_a_partner_again(mesh: Mesh) -> None:
    first, second = mesh.add(0), mesh.add(1)
    first.start(0.0)
    second.start(0.0)
    address = second.server.port
    second.server.close()
    for step in range(20):
        first.exchange(step, 1.0)
    assert first.gossip.counts.failed == 1
    assert first.partners.present([0, 1]) == [0]
    # The same address, and no word from anybody.
    second.server = PeerServer(1, port=address, credentials=mesh.credentials)
    second.server.begin(SEED, ModelFormat(SPECS, SEED, 1))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while first.partners.present([0, 1]) != [0, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_an_interrupt_ends_the_wait_for_a_partner(mesh: Mesh, mode: str) -> None:
    zero, one = (mesh.add(w, mode, [0, 1]) for w in range(2))
    for peer in (zero, one):
        peer.start(0.0)
    silent = socket.create_server(("127.0.0.1", 0))
    mesh.live = {**mesh.live, 1: f"127.0.0.1:{silent.getsockname()[1]}"}
    zero.wait_for_partners(90.0)

    def interrupt() -> None:
        while not zero.partners._calls:
            time.sleep(0.01)
        time.sleep(0.5)
        zero.partners.cancel()

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    begun = time.monotonic()
    for step in range(20):
        zero.exchange(step, 1.0)
    assert 0.4 < time.monotonic() - begun < 60
    # Nobody is blamed.
    assert zero.notices == []
    begun = time.monotonic()
    assert zero.partners.greet(1) is None
    assert time.monotonic() - begun < 60
    assert zero.gossip.average(20, filled(1.0))[0][0] == 1.0
    thread.join()
    silent.close()


def test_an_interrupt_ends_a_greeting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Partners(0, SEED, 60.0) as partners:
        partners.update({1: f"127.0.0.1:{silent.getsockname()[1]}"})
        threading.Timer(0.5, partners.cancel).start()
        begun = time.monotonic()
        assert partners.greet(1) is None
        assert time.monotonic() - begun < 10


def test_who_calls_is_a_partner_again(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = mesh.add(0), mesh.add(1)
    first.start(0.0)
    second.start(0.0)

    def unanswered(*_: object) -> None:
        raise ValueError("of the test")

    # Else the first one may come to know of it by itself.
    monkeypatch.setattr(first.partners, "_greeting", unanswered)
    with first.partners._lock:
        first.partners._silent.add(1)
    assert first.partners.present([0, 1]) == [0]
    second.partners.pull(0, second.gossip._models)
    assert first.partners.present([0, 1]) == [0, 1]


def test_the_average_is_that_of_all_who_are_there_or_done(mesh: Mesh) -> None:
    peers = [mesh.add(w) for w in range(4)]
    for peer in peers:
        peer.start(0.0)
        peer.server.publish(Model(1, filled(float(2**peer.worker))))
    average = functools.partial(peers[0].gossip.average, 1, filled(1.0))
    assert value_of(average()) == (1 + 2 + 4 + 8) / 4
    # One is done, another one dead.
    mesh.done = {3: mesh.live[3]}
    mesh.live = {w: mesh.live[w] for w in (0, 1, 2)}
    peers[2].server.close()
    assert value_of(average()) == pytest.approx((1 + 2 + 8) / 3)
    # Who is done is no partner: what is mixed is 1 and 2.
    assert {peers[0].exchange(step, 1.0) for step in range(30)} <= {1.0, 1.5}


def test_models_of_another_training_are_not_mixed(mesh: Mesh) -> None:
    """What the program writes itself holds, although a partner has not come to it yet."""
    for mode in ("pull", "push"):
        zero, one = mesh.add(0, mode, [0, 1]), mesh.add(1, mode, [0, 1])
        zero.start(1.0)
        one.start(1.0)
        # Worker 1 has trained far, and its model was handed over before worker 0 began anew.
        one.gossip.exchange(500, filled(9.0))
        assert one.partners.push(0, one.gossip._models, one.server.publish(Model(9, filled(9.0))))
        assert zero.start(3.0, key=(2, 0), is_first=False) == 3.0
        for step in range(20):
            assert zero.exchange(step, 3.0) == 3.0
            assert one.exchange(step, 9.0) == 9.0
        assert zero.gossip.average(20, filled(3.0))[0][0] == 3.0
        # That is nobody's fault.
        assert not zero.notices and not one.notices
        assert zero.gossip.counts.failed == one.gossip.counts.failed == 0
        assert one.start(4.0, key=(2, 0), is_first=False) == 3.0
        found = {one.exchange(step, 9.0) for step in range(20)}
        if mode == "pull":
            assert found == {6.0, 9.0}
        zero.close()
        one.close()


def test_messages_that_are_no_whole_model() -> None:
    models = ModelFormat(SPECS, SEED, 0)
    parts = models.write(Model(3, filled(1.0)))
    assert models.read(parts, 0).step == 3 and models.read([]) is None
    large = ModelFormat([("v", "float32", (3, 2**20))], SEED, 0)
    several = large.write(Model(1, [np.zeros(3 * 2**20, "f4")]))
    assert len(several) > 3
    later = large.write(Model(2, [np.zeros(3 * 2**20, "f4")]))
    stranger = ModelFormat(SPECS, SEED + 1, 0).write(Model(3, filled(1.0)))
    header, payload = wire.decode(pb.ToPeer, parts[0])
    bad = {
        "another one": stranger,
        "of the training that began in fit 0": models.of_training((1, 0)).write(
            Model(3, filled(1.0))
        ),
        "other variables": several,
        "bytes in part": [wire.encode(header, bytes(payload)[:-4])],
        "Expected part 0": [*parts, *parts],
        "Expected a part of a model": [models.pull_request()],
        "Expected": [b"\xff"],
    }
    for why, messages in bad.items():
        with pytest.raises(Refusal, match="Expected part 1" if why == "Expected part 0" else why):
            models.read(messages)
    for messages in (several[1:], several[:-1], (several[0], *later[1:]), several[::-1]):
        with pytest.raises(Refusal, match="Expected"):
            large.read(messages)
    with pytest.raises(Refusal, match="of one worker"):
        models.read(parts, 1)
