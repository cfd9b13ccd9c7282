"""Workers that keep contributions back which are not finite, with a real service."""

import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tf_syncdist.aggregation import recovery
from tf_syncdist.errors import NonFiniteGradientError
from tf_syncdist.propagation.policies import FifoPropagation, cutter
from tf_syncdist.propagation.rows import Rows
from tf_syncdist.propagation.slices import TensorSpec
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies.controller import Mode, RunController

from .conftest import Site, Store

Serve = Callable[..., object]
SHAPES = ((4, 6), (7,))
SPECS = [
    TensorSpec("float32", SHAPES[0]),
    TensorSpec("float32", (9, 4), by_rows=True),
    TensorSpec("float32", SHAPES[1]),
]
NAN, INF = float("nan"), float("inf")


class Trainer:
    """A worker whose gradients are some number everywhere.

    Args:
        session: Its connection.
        policy: What it does with what is not finite.
    """

    def __init__(self, session: object, policy: str = "drop") -> None:
        self.session = session
        self.site = _Site()
        self.controller = RunController(
            session,
            Store(session.config.worker),
            cutter(FifoPropagation(), 24, 1, session.config.num_workers),
            lambda: None,
            lambda text: None,
            nonfinite=policy,
        )

    def do_run(self, *values: float) -> list[list[np.ndarray]]:
        """Does a run with an exchange for each value; returns their results."""
        mode = self.controller.begin(self.site)
        way = self.controller.plan(SPECS)
        results = []
        for value in values:
            if mode is Mode.COMPUTE:
                results.append(self.controller.exchange_last(way, 0, _parts(way, value)))
            else:
                results.append(self.controller.stored(way))
        self.controller.finish(self.site, [])
        return [[r.copy() for r in tensors] for tensors in results]


class _Site(Site):
    def __init__(self) -> None:
        super().__init__((), True)

    def name_of(self, exchange: int, tensor: int) -> str:
        return f"variable_{tensor}"


def _parts(way: object, value: float) -> list[np.ndarray]:
    """Returns what a gradient of some number everywhere is for `exchange_last`."""
    tensors = {
        0: [np.full(SHAPES[0], value, "f4")],
        1: [np.array([2, 7]), np.full((2, 4), value, "f4")],
        2: [np.full(SHAPES[1], value, "f4")],
    }
    return [part for bucket in way.buckets for t in bucket.tensors for part in tensors[t]]


def _is(results: Sequence[np.ndarray], value: float) -> bool:
    """Whether results are those of such gradients."""
    table = np.zeros((9, 4), "f4")
    table[[2, 7]] = value
    expected = [np.full(SHAPES[0], value, "f4"), table, np.full(SHAPES[1], value, "f4")]
    return all(np.array_equal(r, e) for r, e in zip(results, expected, strict=True))


def _bytes(results: Sequence[np.ndarray]) -> bytes:
    return b"".join(r.tobytes() for r in results)


def _together(service: object, trainers: list[Trainer], *values: Sequence[float]) -> list:
    runs = (functools.partial(t.do_run, *v) for t, v in zip(trainers, values, strict=True))
    return service.together(*runs)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
def test_the_others_make_the_update(serve: Serve, shards: int, transport: str) -> None:
    service = serve(3, shards=shards, transport=transport)
    trainers = [Trainer(s) for s in service.sessions()]
    for bad in (NAN, INF, -INF):
        for (result,) in _together(service, trainers, [1.0], [bad], [4.0]):
            # The mean of two contributions, times N = 3.
            assert _is(result, 7.5)
    for (result,) in _together(service, trainers, [1.0], [2.0], [4.0]):
        assert _is(result, 7.0)
    reports = [t.controller.report() for t in trainers]
    assert [r.nonfinite for r in reports] == [0, 3, 0]
    assert [(r.contributed, r.late) for r in reports] == [(4, 0), (1, 3), (4, 0)]
    service.until(lambda: [w.nonfinite for w in service_report(trainers)] == [0, 3, 0])
    assert [w.late for w in service_report(trainers)] == [0, 3, 0]


def service_report(trainers: list[Trainer]) -> Sequence[pb.WorkerReport]:
    return trainers[0].session.report().workers


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("num_workers, b", [(1, 0), (2, 0), (3, 0), (3, 1)])
def test_a_round_from_which_all_keep_back_is_zero(
    serve: Serve, num_workers: int, b: int, shards: int
) -> None:
    service = serve(num_workers, b=b, shards=shards)
    trainers = [Trainer(s) for s in service.sessions()]
    for _ in range(3):
        for (result,) in _together(service, trainers, *[[NAN]] * num_workers):
            assert _is(result, 0.0)
    rounds = {t.controller.report().rounds for t in trainers}
    assert rounds == {3}
    for (result,) in _together(service, trainers, *[[2.0]] * num_workers):
        assert _is(result, 2.0 * (num_workers - b))


def test_all_keep_back_in_each_exchange_of_a_run(serve: Serve) -> None:
    service = serve(2)
    trainers = [Trainer(s) for s in service.sessions()]
    results = _together(service, trainers, *[[NAN, NAN, NAN]] * 2)
    assert all(_is(r, 0.0) for tensors in results for r in tensors)
    assert [t.controller.report().nonfinite for t in trainers] == [1, 1]


def test_who_was_asked_for_zeros_takes_part_in_the_rest_of_the_run(serve: Serve) -> None:
    service = serve(2)
    trainers = [Trainer(s) for s in service.sessions()]
    results = _together(service, trainers, [NAN, 3.0], [INF, 5.0])
    for first, second in results:
        assert _is(first, 0.0)
        assert _is(second, 2 * 3.0), "worker 0 was asked; worker 1 still keeps back"


def test_what_was_in_an_exchange_before_stays(serve: Serve) -> None:
    service = serve(2)
    trainers = [Trainer(s) for s in service.sessions()]
    for first, second in _together(service, trainers, [1.0, NAN], [2.0, 8.0]):
        assert _is(first, 3.0)
        assert _is(second, 16.0)


def test_the_round_ends_when_the_last_one_with_values_leaves(serve: Serve) -> None:
    service = serve(3)
    trainers = [Trainer(s) for s in service.sessions()]

    def leave() -> list:
        service.until(lambda: service_arrived(service) == 2)
        trainers[2].session.goodbye(pb.FAILED, 0)
        return []

    results = service.together(
        functools.partial(trainers[0].do_run, NAN),
        functools.partial(trainers[1].do_run, NAN),
        leave,
    )
    assert all(_is(result, 0.0) for tensors in results[:2] for result in tensors)


def service_arrived(service: object) -> int:
    return service.servers[0].job._rounds.arrived(0)


def test_an_error_ends_one_worker_and_the_others_go_on(serve: Serve) -> None:
    service = serve(3)
    trainers = [Trainer(s, "error") for s in service.sessions()]
    _together(service, trainers, [1.0], [1.0], [1.0])

    def fail() -> list:
        text = r"tensor 0, that of 'variable_0', of exchange 0 in run 1 on worker 1"
        with pytest.raises(NonFiniteGradientError, match=text):
            trainers[1].do_run(NAN)
        with pytest.raises(NonFiniteGradientError):
            trainers[1].do_run(1.0)
        trainers[1].session.goodbye(pb.FAILED, 1)
        return []

    results = service.together(
        functools.partial(trainers[0].do_run, 1.0), fail, functools.partial(trainers[2].do_run, 3.0)
    )
    for tensors in (results[0], results[2]):
        assert _is(tensors[0], 6.0)
    assert trainers[1].controller.report().nonfinite == 1


def test_the_default_passes_values_through(serve: Serve) -> None:
    service = serve(2)
    trainers = [Trainer(s, "pass") for s in service.sessions()]
    for (result,) in _together(service, trainers, [NAN], [1.0]):
        assert np.isnan(result[0]).all() and np.isnan(result[1][[2, 7]]).all()
    assert [t.controller.report().nonfinite for t in trainers] == [0, 0]


def test_zeros_that_nobody_asked_for_do_no_harm(serve: Serve) -> None:
    """A worker that is asked although the round is complete sends what is late."""
    service = serve(2)
    trainers = [Trainer(s) for s in service.sessions()]
    _together(service, trainers, [1.0], [2.0])
    job = service.servers[0].job
    for worker in (0, 1):
        job._streams.tell(worker, pb.ToWorker(all_withheld=pb.AllWithheld(run=0)))
        job._streams.tell(worker, pb.ToWorker(all_withheld=pb.AllWithheld(run=1)))
    (one,), (other,) = _together(service, trainers, [NAN], [2.0])
    assert _bytes(one) == _bytes(other)
    # Slices close one by one, with worker 1 alone or with both.
    assert set(np.unique(np.concatenate([r.reshape(-1) for r in one]))) <= {0.0, 2.0, 4.0}
    for (result,) in _together(service, trainers, [1.0], [2.0]):
        assert _is(result, 3.0)


def test_rows_without_any_travel(serve: Serve) -> None:
    service = serve(2)
    trainers = [Trainer(s) for s in service.sessions()]
    way = trainers[0].controller.plan(SPECS)
    empty = Rows(np.empty(0, np.int64), np.empty((0, 4), "f4"))
    for trainer in trainers:
        trainer.session.begin_run(0)
        arrays = [np.zeros(SHAPES[0], "f4"), empty, np.zeros(SHAPES[1], "f4")]
        trainer.session.send(0, 0, way, arrays)
    for trainer in trainers:
        results = [np.full(s.shape, 7, s.dtype) for s in SPECS]
        assert trainer.session.receive(0, 0, way, results) == (len(way.slices), len(way.slices))
        assert _is(results, 0.0)


@pytest.mark.parametrize("shards", [1, 2])
def test_who_keeps_back_what_nobody_else_has_input_for_ends_the_pass(
    serve: Serve, shards: int
) -> None:
    service = serve(2, shards=shards)
    first, second = (Trainer(s) for s in service.sessions())
    _together(service, [first, second], [1.0], [2.0])
    results: list[list[np.ndarray]] = []

    def has_input() -> None:
        assert first.session.enter_run(0, 1)
        results.extend(first.do_run(NAN))
        # It has begun the run, so it is the last one of the pass.
        assert not first.session.enter_run(0, 2)

    def has_none() -> None:
        while not second.session.vote_end(0, second.controller.run):
            results.extend(second.do_run(5.0))

    service.together(has_input, has_none)
    assert all(_is(tensors, 0.0) for tensors in results)
    assert [t.controller.run for t in (first, second)] == [2, 2]


@pytest.mark.parametrize("policies", [("drop", "pass"), ("drop", "drop")])
def test_who_keeps_back_is_there_all_the_same(serve: Serve, policies: tuple[str, str]) -> None:
    """A round is not closed with fewer than `min_workers`; these are lost by other means."""
    service = serve(2, min_workers=2)
    trainers = [Trainer(s, p) for s, p in zip(service.sessions(), policies, strict=True)]
    second = 3.0 if policies[1] == "pass" else NAN
    for (result,) in _together(service, trainers, [NAN], [second]):
        assert _is(result, 6.0 if policies[1] == "pass" else 0.0)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_service_that_is_started_again_knows_who_keeps_back(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    monkeypatch.setattr(recovery, "GRACE_SECONDS", 30.0)  # All are to come back.
    service = serve(3, shards=shards)
    trainers = [Trainer(s) for s in service.sessions()]
    # Worker 1 keeps back in every third run, all of them in every fifth.
    values = [
        [NAN if run % 5 == 0 or (worker == 1 and run % 3 == 0) else worker + 1.0]
        for worker in range(3)
        for run in range(120)
    ]
    stop = threading.Event()

    def train(worker: int) -> list[list[np.ndarray]]:
        mine = values[worker * 120 : (worker + 1) * 120]
        first = [trainers[worker].do_run(*value)[0] for value in mine[:60]]
        service.until(lambda: service.restarts)
        return first + [trainers[worker].do_run(*value)[0] for value in mine[60:]]

    thread = threading.Thread(target=service.keep_restarting, args=(stop, shards))
    thread.start()
    try:
        results = service.together(*(functools.partial(train, w) for w in range(3)))
    finally:
        stop.set()
        thread.join(60)
    assert any("connected again" in n for n in service.notices[0])
    for run in range(120):
        # The mean of 1, 2, 3, or of 1, 3, times 3; or nothing.
        expected = 0.0 if run % 5 == 0 else 6.0
        assert all(_is(result[run], expected) for result in results), run
    counted = [24, 56, 24]
    assert [t.controller.report().nonfinite for t in trainers] == counted
    service.until(lambda: [w.nonfinite for w in service_report(trainers)] == counted)
