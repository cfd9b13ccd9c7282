"""Workers mix their models with a centre in the service; nobody waits for anybody."""

import functools
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tf_syncdist.errors import ModelMismatchError
from tf_syncdist.mixing.centre_policies import AsyncCentre, ElasticCentre, serialize
from tf_syncdist.propagation.slices import Plan, TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
SHAPES = [(3, 5), (7,), (2, 2)]
SPECS = [(f"v{i}", "float32", shape) for i, shape in enumerate(SHAPES)]


def cut(shards: int = 1, bucket_bytes: int = 24) -> Plan:
    """Slices of a few values each."""
    return plan([TensorSpec("float32", s) for s in SHAPES], bucket_bytes, shards)


def model(worker: int) -> list[np.ndarray]:
    """A model, another one for each worker."""
    rng = np.random.default_rng(worker)
    return [rng.normal(size=s).astype("f4").reshape(-1) for s in SHAPES]


def opened(service: object, sessions: Sequence[Session], way: Plan) -> list[list[np.ndarray]]:
    """Lets all workers begin with the centre, and returns what each was given."""

    def begin(session: Session) -> list[np.ndarray]:
        given, _ = session.open_centre(SPECS, way, model(session.config.worker))
        return [v.copy() for v in given]

    return service.together(*(functools.partial(begin, s) for s in sessions))


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    """Whether two models have the same bits."""
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
def test_elastic_averaging_is_the_rule_of_the_paper(
    serve: Serve, shards: int, transport: str
) -> None:
    rate = 0.3
    service = serve(2, shards=shards, centre=serialize(ElasticCentre(rate)), transport=transport)
    sessions, way = service.sessions(), cut(shards)
    assert min(way.num_slices) >= 1
    for given in opened(service, sessions, way):
        assert same(given, model(0))
    centre, models = model(0), [model(0), model(1)]
    for step in range(5):
        mine = models[step % 2]
        before, mixed = sessions[step % 2].mix(mine)
        assert same(before, centre)
        assert mixed.slices == len(way.slices) and not mixed.too_stale
        for c, m in zip(centre, mine, strict=True):
            total = np.sum(c, dtype="f8") + np.sum(m, dtype="f8")
            difference = np.float32(rate) * (m - c)
            c += difference
            m -= difference
            assert np.sum(c, dtype="f8") + np.sum(m, dtype="f8") == pytest.approx(total, abs=1e-5)
    assert same(sessions[0].read_centre(), centre)
    report = sessions[0].report()
    assert [w.mixed for w in report.workers] == [3, 2]
    if shards == 1:
        assert report.centre_bytes == sum(v.nbytes for v in centre)


def test_differences_are_added_and_their_staleness_is_counted(serve: Serve) -> None:
    service = serve(2, centre=serialize(AsyncCentre()))
    first, second = service.sessions()
    way = cut()
    opened(service, [first, second], way)
    one = [np.ones_like(v) for v in model(0)]
    expected = model(0)
    for count in range(3):
        now, mixed = first.mix(one)
        expected = [e + 1 for e in expected]
        assert same(now, expected) and mixed.staleness == 0, count
    now, mixed = second.mix([2 * v for v in one])
    assert same(now, [e + 2 for e in expected]) and mixed.staleness == 3
    assert first.mix(one)[1].staleness == 1
    reported = second.report().workers
    assert [w.mixed for w in reported] == [4, 1]
    assert [w.staleness_sum for w in reported] == [1, 3]
    assert [w.staleness_max for w in reported] == [1, 3]


def test_what_is_too_stale_is_left_out(serve: Serve) -> None:
    service = serve(2, centre=serialize(AsyncCentre(max_staleness=1)))
    first, second = service.sessions()
    opened(service, [first, second], cut())
    one = [np.ones_like(v) for v in model(0)]
    first.mix(one)
    assert second.mix(one)[1].too_stale == 0
    first.mix(one)
    first.mix(one)
    before = [v.copy() for v in first.read_centre()]
    now, mixed = second.mix(one)
    assert mixed.too_stale == mixed.slices and mixed.staleness == 2
    # It is told the present parameters, and goes on from there.
    assert same(now, before)
    assert second.mix(one)[1].too_stale == 0
    assert [w.too_stale for w in first.report().workers] == [0, 1]


def test_who_only_looks_at_the_centre_is_as_stale_as_before(serve: Serve) -> None:
    service = serve(2, centre=serialize(AsyncCentre(max_staleness=2)))
    first, second = service.sessions()
    opened(service, [first, second], cut())
    one = [np.ones_like(v) for v in model(0)]
    for _ in range(3):
        first.mix(one)
    # As for an evaluation: worker 1 goes on with what it had.
    second.read_centre()
    mixed = second.mix(one)[1]
    assert mixed.staleness == 3 and mixed.too_stale == mixed.slices
    for _ in range(3):
        first.mix(one)
    second.read_centre(goes_on_from_it=True)
    assert second.mix(one)[1].staleness == 0


def test_slices_serve_one_request_at_a_time(serve: Serve) -> None:
    """Sums of small whole numbers are exact in any order, so nothing may be lost or doubled."""
    shapes = [(1000, 100), (50,)]
    specs = [(f"v{i}", "float32", s) for i, s in enumerate(shapes)]
    way = plan([TensorSpec("float32", s) for s in shapes], 30_000, 2)
    zero = [np.zeros(np.prod(s), "f4") for s in shapes]
    service = serve(4, shards=2, centre=serialize(AsyncCentre()))
    sessions = service.sessions()
    steps = 25

    def work(session: Session) -> None:
        session.open_centre(specs, way, zero)
        mine = [np.full_like(v, session.config.worker + 1) for v in zero]
        last = 0.0
        for _ in range(steps):
            now, _ = session.mix(mine)
            for part in way.slices:
                values = {float(v) for t, a, b in part.pieces for v in now[t][a:b]}
                assert len(values) == 1, "a slice has values of two moments"
            assert now[0][0] > last
            last = now[0][0]

    service.together(*(functools.partial(work, s) for s in sessions))
    total = steps * (1 + 2 + 3 + 4)
    assert all(np.all(v == total) for v in sessions[0].read_centre())


def test_nobody_waits_for_a_worker_that_hangs(serve: Serve) -> None:
    service = serve(3, centre=serialize(ElasticCentre(0.2)))
    sessions = service.sessions()
    opened(service, sessions, cut())
    # Whoever waited for worker 2 would do so in vain.
    for _ in range(20):
        sessions[0].mix(model(0))
        sessions[1].mix(model(1))
    assert [w.mixed for w in sessions[0].report().workers] == [20, 20, 0]


def test_who_comes_late_begins_with_the_centre(serve: Serve) -> None:
    service = serve(3, centre=serialize(AsyncCentre()))
    early = [service.session(0), service.session(1)]
    opened(service, early, cut())
    one = [np.ones_like(v) for v in model(0)]
    early[1].mix(one)
    late = service.session(2)
    assert same(late.open_centre(SPECS, cut(), model(2))[0], [v + 1 for v in model(0)])


def test_who_comes_when_all_others_have_ended_begins_with_the_centre(serve: Serve) -> None:
    service = serve(2, centre=serialize(AsyncCentre()))
    first, second = service.sessions()
    way = cut()
    first.open_centre(SPECS, way, model(0))
    trained, _ = first.mix([np.ones_like(v) for v in model(0)])
    trained = [v.copy() for v in trained]
    first.goodbye(pb.FINISHED, 1)
    given, _ = second.open_centre(SPECS, way, model(1))
    assert same(given, trained) and same(given, [v + 1 for v in model(0)])


def test_a_new_process_begins_with_the_centre(serve: Serve) -> None:
    service = serve(2, centre=serialize(AsyncCentre()))
    sessions = service.sessions()
    opened(service, sessions, cut())
    one = [np.ones_like(v) for v in model(0)]
    sessions[0].mix(one)
    sessions[0].close()
    service.until(lambda: any("is gone" in n for n in service.notices[1]))
    sessions[1].mix(one)
    again = service.session(0)
    # Worker 0's own variables are the centre at the start only.
    assert same(again.open_centre(SPECS, cut(), model(7))[0], [v + 1 + 1 for v in model(0)])
    assert again.mix(one)[1].staleness == 0


def test_another_one_gives_the_first_centre_if_worker_0_is_gone(serve: Serve) -> None:
    """Worker 0 goes when the others wait for it already, and has never asked for a centre."""
    service = serve(3, centre=serialize(AsyncCentre()))
    zero, *others = service.sessions()

    def go() -> None:
        time.sleep(0.5)
        zero.close()

    def begin(session: Session) -> list[np.ndarray]:
        given, _ = session.open_centre(SPECS, cut(), model(session.config.worker))
        return [v.copy() for v in given]

    begun = time.monotonic()
    found = service.together(go, *(functools.partial(begin, s) for s in others))
    # It is not waited for until it is given up.
    assert time.monotonic() - begun < 25
    assert same(found[1], found[2]) and any(same(found[1], model(w)) for w in (1, 2))


def test_values_are_taken_in_once_where_a_connection_breaks(serve: Serve) -> None:
    service = serve(2, centre=serialize(AsyncCentre()))
    sessions = service.sessions()
    opened(service, sessions, cut())
    one = [np.ones_like(v) for v in model(0)]
    done = threading.Event()
    steps = 0

    def work() -> None:
        nonlocal steps
        try:
            for _ in range(150):
                sessions[0].mix(one)
                steps += 1
        finally:
            done.set()

    def disturb() -> None:
        for _ in range(20):
            before = steps
            if done.wait(0.15):
                return
            # However long it takes to connect again, it goes on.
            service.until(lambda before=before: done.is_set() or steps > before)
            sessions[0]._connections[0].abandon()  # noqa: SLF001

    service.together(work, disturb)
    now = sessions[1].read_centre()
    assert all(np.allclose(n - s, steps, atol=1e-3) for n, s in zip(now, model(0), strict=True))


def test_other_variables_are_an_error_that_names_the_first(serve: Serve) -> None:
    service = serve(2, centre=serialize(ElasticCentre(0.2)))
    first, second = service.sessions()
    first.open_centre(SPECS, cut(), model(0))
    other = [SPECS[0], ("w1", "float32", (8,)), SPECS[2]]
    way = plan([TensorSpec("float32", s) for _, _, s in other], 24, 1)
    values = [np.zeros(np.prod(s), "f4") for _, _, s in other]
    match = r"variable 1 is v1 \(float32, shape \[7\]\) on worker 0 and w1 \(float32, shape \[8\]\)"
    with pytest.raises(ModelMismatchError, match=match):
        second.open_centre(other, way, values)
    # The other one goes on.
    first.mix(model(0))


def test_every_training_has_a_centre_that_its_first_worker_gives(serve: Serve) -> None:
    service = serve(2, shards=2, centre=serialize(AsyncCentre()))
    first, second = service.sessions()
    way = cut(2)
    opened(service, [first, second], way)
    one = [np.ones_like(v) for v in model(0)]
    first.mix(one)
    # Worker 1 goes on to the next training, of other variables, and does not wait for worker 0.
    other = [("w", "float32", (6,))]
    cut_anew = plan([TensorSpec("float32", (6,))], 8, 2)
    begun, _ = second.open_centre(other, cut_anew, [np.full(6, 3, "f4")], key=(1, 0), joins=False)
    assert same(begun, [np.full(6, 3, "f4")])
    second.mix([np.ones(6, "f4")])
    assert first.mix(one)[1].staleness == 0
    model_bytes = sum(v.nbytes for v in model(0))
    reply = [s.job.report().centre_bytes for s in service.servers]
    assert sum(reply) == model_bytes + 24
    joined, _ = first.open_centre(other, cut_anew, [np.zeros(6, "f4")], key=(1, 0), joins=False)
    assert same(joined, [np.full(6, 4, "f4")])
    # Nobody is at the first one any more.
    assert sum(s.job.report().centre_bytes for s in service.servers) == 24


def test_a_centre_is_one_workers_on_all_shards(serve: Serve) -> None:
    """Though they come to it at the same moment, and those that begin do not know which it is."""
    service = serve(4, shards=3, centre=serialize(AsyncCentre()))
    sessions, way = service.sessions(), cut(3)
    opened(service, sessions, way)
    for fit in range(1, 16):
        # Worker 3 begins again and again, and does not know of the others' trainings.
        sessions[3].close()
        service.until(lambda: all(3 not in s.job._streams for s in service.servers))
        sessions[3] = service.session(3)

        def begin(session: Session, fit: int = fit) -> tuple[tuple[int, int], list[np.ndarray]]:
            worker = session.config.worker
            key, joins = ((0, 0), True) if worker == 3 else ((fit, 0), False)
            values, key = session.open_centre(SPECS, way, model(10 * fit + worker), key, joins)
            return key, [v.copy() for v in values]

        found = service.together(*(functools.partial(begin, s) for s in sessions))
        newest = [values for key, values in found if key == (fit, 0)]
        older = [values for key, values in found if key != (fit, 0)]
        assert len(newest) >= 3 and [key for key, _ in found[3:]] <= [(fit, 0)]
        for values in newest:
            assert same(values, newest[0])
            assert any(same(values, model(10 * fit + worker)) for worker in range(4))
        for values in older:
            assert any(same(values, model(10 * fit - 10 + worker)) for worker in range(4))


def test_the_first_shard_decides_who_gives_what_others_have_nothing_of_yet(serve: Serve) -> None:
    service = serve(2, shards=2, centre=serialize(AsyncCentre()))
    first, second = service.sessions()
    # All of it is on the first shard, so that the other one has never had a centre.
    small = [("w", "float32", (2,))]
    whole = plan([TensorSpec("float32", (2,))], 24, 2)
    for session in (first, second):
        session.open_centre(small, whole, [np.ones(2, "f4")])
    for session in (second, first):
        values = model(session.config.worker)
        found, _ = session.open_centre(SPECS, cut(2), values, (1, 0), joins=False)
        assert same(found, model(1))


def test_who_finds_a_centre_on_the_first_shard_only_begins_with_the_next_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(3, shards=2, centre=serialize(AsyncCentre()))
    *others, late = service.sessions()
    way, told, gone_on, send_open = cut(2), threading.Event(), threading.Event(), late._send_open

    def send_late(shard: int) -> None:
        if shard and not told.is_set():
            told.set()
            assert gone_on.wait(10)
        send_open(shard)

    monkeypatch.setattr(late, "_send_open", send_late)
    opened(service, others, way)

    def begin() -> tuple[list[np.ndarray], tuple[int, int]]:
        found, key = late.open_centre(SPECS, way, model(2), (0, 0))
        return [v.copy() for v in found], key

    def go_on() -> None:
        assert told.wait(10)
        for session in others:
            session.open_centre(SPECS, way, model(5), (1, 0), joins=False)
        gone_on.set()

    (found, key), _ = service.together(begin, go_on)
    assert key == (1, 0) and same(found, model(5))


def test_who_has_missed_what_a_program_wrote_is_given_the_newest(serve: Serve) -> None:
    service = serve(2, centre=serialize(AsyncCentre()))
    sessions = service.sessions()
    opened(service, sessions, cut())
    for session in sessions:
        written, key = session.open_centre(SPECS, cut(), model(5), (3, 2), joins=False)
        assert same(written, model(5)) and key == (3, 2)
    sessions[0].close()
    service.until(lambda: any("is gone" in n for n in service.notices[1]))
    again = service.session(0)
    found, key = again.open_centre(SPECS, cut(), model(0), (4, 0))
    assert same(found, model(5)) and key == (3, 2)


def test_workers_must_want_the_same_rule(serve: Serve) -> None:
    service = serve(2, centre=serialize(ElasticCentre(0.2)))
    service.session(0)
    with pytest.raises(Exception, match="Expected every worker to be given the same `centre`"):
        service.session(1, centre=serialize(ElasticCentre(0.3)))
