"""Variables and metrics that travel between workers, by a real service over real sockets."""

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from tf_syncdist.aggregation import membership, recovery, relays
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.errors import ModelMismatchError, ServiceError, SyncDistError, WaitTimeoutError
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
MODEL = [("dense/kernel", "float32", (2, 3)), ("dense/bias", "float32", (3,))]
WAY = plan([TensorSpec("float32", (2,))], 100, 1)


def do_run(session: Session, run: int, fate: Fate = Fate.CONTRIBUTED) -> bool:
    """Takes a worker through a run; returns whether there was a result."""
    if fate is Fate.CONTRIBUTED:
        session.send(run, 0, WAY, [np.ones(2, "f4")])
    found = session.receive(run, 0, WAY, [np.empty(2, "f4")])
    session.finish(run, 1, fate)
    return found is not None


def behind(serve: Serve, num_workers: int = 2) -> tuple:
    """A job without history whose worker 0 has done 9 runs and the others have done one.

    Runs 1 to 3 were sent to the others before they were gone, so run 4 is the first they lack.
    """
    service = serve(num_workers, b=num_workers - 1, history_rounds=1, history_bytes=0)
    sessions = service.sessions()
    for run in range(9):
        assert do_run(sessions[0], run)
    for session in sessions[1:]:
        service.until(lambda s=session: s.exchanges_of(8) is not None)
        for run in range(4):
            assert session.wait_results(run)
            assert do_run(session, run, Fate.REPLAYED)
        assert not session.wait_results(4)
    return service, sessions


def test_workers_that_train_the_same_variables_agree(serve: Serve) -> None:
    service = serve(3)
    service.together(*(functools.partial(s.agree, 0, MODEL) for s in service.sessions()))


def test_workers_that_train_other_variables_all_learn_which(serve: Serve) -> None:
    service = serve(3)
    other = [MODEL[0], ("dense/bias", "float32", (4,))]

    def agree(session: Session, variables: list) -> str:
        with pytest.raises(ModelMismatchError) as error:
            session.agree(0, variables)
        return str(error.value)

    errors = service.together(
        *(
            functools.partial(agree, s, m)
            for s, m in zip(service.sessions(), [MODEL, other, MODEL], strict=True)
        )
    )
    assert len(set(errors)) == 1
    assert "dense/bias (float32, shape [3]) on worker 0" in errors[0]
    assert "dense/bias (float32, shape [4]) on worker 1" in errors[0]


def state() -> list[np.ndarray]:
    """Variables of many types and sizes; the first one travels in several pieces."""
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(3, 2**18)).astype("f4"),
        np.array(7, "i8"),
        np.zeros((0, 3), "f4"),
        rng.normal(size=5).astype("f8"),
        np.array([True, False]),
        rng.normal(size=3).astype("f2"),
        np.asfortranarray(rng.integers(0, 255, (4, 5)).astype("u1")),
        np.zeros((2, 0), "i4"),
    ]


def specs_of(values: list[np.ndarray]) -> list[tuple[str, str, tuple[int, ...]]]:
    """What a worker says about its variables."""
    return [(f"v{i}", v.dtype.name, v.shape) for i, v in enumerate(values)]


def same(values: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Whether variables are equal, bit for bit."""
    return all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(values, others, strict=True)
    )


@pytest.mark.parametrize(
    "values",
    [state(), [np.arange(3).astype(ml_dtypes.bfloat16)]],
    ids=["many", "bfloat16"],
)
@pytest.mark.parametrize("early", [False, True], ids=["after", "before"])
def test_the_variables_of_worker_0_come_to_all_others(
    serve: Serve, values: list[np.ndarray], early: bool
) -> None:
    """Whether it gives them after all agree, or before."""
    service = serve(3)
    specs = specs_of(values)

    def start(session: Session) -> list[np.ndarray]:
        if session.config.worker == 0 and early:
            session.give_state(0, 7, values)
        session.agree(7, specs)
        if session.config.worker == 0:
            if not early:
                session.give_state(0, 7, values)
            return values
        received = session.receive_state(specs)
        assert received.run == 7
        return received.values

    for received in service.together(*(functools.partial(start, s) for s in service.sessions())):
        assert same(received, values)


def test_workers_learn_that_worker_0_is_lost_before_it_gave_its_variables(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "AWAY_SECONDS", 0.3)
    service = serve(3)
    first, *others = service.sessions()
    service.together(*(functools.partial(s.agree, 0, MODEL) for s in (first, *others)))
    first.close()
    for session in others:
        with pytest.raises(SyncDistError) as error:
            session.receive_state(MODEL)
        assert not isinstance(error.value, WaitTimeoutError)


def test_who_has_not_begun_when_the_service_is_lost_takes_over_the_state_of_worker_0(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "GRACE_SECONDS", 30.0)  # All are to come back.
    service = serve(3)
    first, *others = service.sessions()
    service.together(*(functools.partial(s.agree, 0, MODEL) for s in (first, *others)))
    # Worker 0 is past the start, and what it gave the others was lost with the service.
    first.hold(MODEL)
    service.restart(0)

    def begin(session: Session) -> tuple[int, bytes]:
        assert session.receive_state(MODEL) is None
        session.hold(MODEL)
        session.request_state(0, level_will_do=True)
        received = session.receive_state(MODEL)
        session.resume(received.run, 0)
        assert do_run(session, 0)
        return received.run, b"".join(v.tobytes() for v in received.values)

    def give() -> tuple[int, bytes]:
        values = [np.full(shape, 3, "f4") for _, _, shape in MODEL]
        for _ in others:
            (request, *more) = service.until(first.take_state_requests)
            for number in (request, *more):
                first.give_state(number, 0, values, MODEL)
            if more:
                break
        assert do_run(first, 0)
        return 0, b"".join(v.tobytes() for v in values)

    found = service.together(give, *(functools.partial(begin, s) for s in others))
    assert len(set(found)) == 1


def test_nobody_waits_for_a_worker_that_has_sent_values_before_it_asked_for_a_state(
    serve: Serve,
) -> None:
    """Its values may come after its request: slices wait for their turn."""
    service = serve(2)
    giver, receiver = service.sessions()
    service.together(functools.partial(do_run, giver, 0), functools.partial(do_run, receiver, 0))
    receiver.request_state(1, giver=0)
    (request,) = service.until(giver.take_state_requests)
    receiver.send(1, 0, WAY, [np.ones(2, "f4")])
    values = state()
    # A state is given between two runs, and before that both take place without the receiver.
    for run in (1, 2):
        assert do_run(giver, run)
    giver.give_state(request, 3, values)
    assert receiver.receive_state(specs_of(values)).run == 3
    receiver.resume(3, 2)
    assert service.together(
        functools.partial(do_run, giver, 3), functools.partial(do_run, receiver, 3)
    ) == [True, True]
    assert giver.report().workers[1].missed == 2


def test_a_worker_too_far_behind_gets_the_state_of_one_that_is_not(serve: Serve) -> None:
    service, (giver, receiver) = behind(serve)
    assert receiver.receive(4, 0, WAY, [np.empty(2, "f4")]) is None
    receiver.request_state(4)
    (request,) = service.until(giver.take_state_requests)
    assert giver.take_state_requests() == []
    values = state()
    giver.give_state(request, 9, values)
    received = receiver.receive_state(specs_of(values))
    assert received.run == 9 and same(received.values, values)
    # Both go on from there.
    receiver.resume(9, 5)
    assert do_run(giver, 9)
    service.until(lambda: receiver.exchanges_of(9) is not None)
    assert do_run(receiver, 9, Fate.REPLAYED)
    service.until(lambda: giver.report().workers[1].replayed == 10)
    report = giver.report().workers[1]
    assert (report.missed, report.contributed, report.late) == (5, 0, 0)


def test_a_worker_that_is_not_behind_gets_no_state(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "_NOBODY_SECONDS", 0.3)
    first, second = serve(2).sessions()
    second.request_state(0)
    with pytest.raises(ServiceError, match="FAILED_PRECONDITION.*as far as worker 1"):
        second.receive_state(MODEL)
    assert first.take_state_requests() == []


def test_state_that_nobody_asked_for_goes_nowhere(serve: Serve) -> None:
    service, (giver, receiver) = behind(serve)
    service.be_impatient(timeout_seconds=0.5)
    giver.give_state(77, 9, state())
    with pytest.raises(WaitTimeoutError):
        receiver.receive_state(MODEL)
    assert not giver.has_failed


def test_a_worker_that_was_not_asked_may_not_answer(serve: Serve) -> None:
    service, (giver, receiver, third) = behind(serve, 3)
    receiver.request_state(4)
    (request,) = service.until(giver.take_state_requests)
    third.give_state(request, 4, state())
    service.until(lambda: third.has_failed)
    with pytest.raises(ServiceError, match="INVALID_ARGUMENT.*from worker 0.*worker=2"):
        third.exchanges_of(9)
    values = state()
    giver.give_state(request, 9, values)
    assert same(receiver.receive_state(specs_of(values)).values, values)


def test_another_worker_is_asked_when_the_giver_is_lost(serve: Serve) -> None:
    service, (giver, receiver, third) = behind(serve, 3)
    third.resume(9, 5)
    service.until(lambda: third.report().workers[2].missed == 5)
    receiver.request_state(4)
    service.until(giver.take_state_requests)
    giver.close()
    (request,) = service.until(third.take_state_requests)
    values = state()
    third.give_state(request, 9, values)
    assert same(receiver.receive_state(specs_of(values)).values, values)


def test_a_receiver_is_told_when_the_only_possible_giver_is_lost(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "_NOBODY_SECONDS", 0.3)
    service, (giver, receiver) = behind(serve)
    receiver.request_state(4)
    service.until(giver.take_state_requests)
    giver.close()
    with pytest.raises(ServiceError):
        receiver.receive_state(MODEL)


def test_others_go_on_when_the_only_possible_giver_is_lost(serve: Serve) -> None:
    service, (giver, receiver, third) = behind(serve, 3)
    receiver.request_state(4)
    service.until(giver.take_state_requests)
    giver.close()
    service.until(lambda: any("worker 0 is gone" in n for n in service.notices[2]))
    receiver.close()
    third.resume(9, 5)
    assert do_run(third, 9)


def test_a_worker_at_the_same_run_gives_its_state_if_it_is_named(serve: Serve) -> None:
    """As often as it is needed, one request at a time."""
    service = serve(3)
    first, second, third = service.sessions()
    values = state()
    for giver in (first, third, first):
        second.request_state(0, giver=giver.config.worker)
        (request,) = service.until(giver.take_state_requests)
        giver.give_state(request, 0, values)
        received = second.receive_state(specs_of(values))
        assert received.run == 0 and same(received.values, values)


def test_another_worker_gives_its_state_if_the_named_one_is_gone(serve: Serve) -> None:
    service = serve(3)
    first, second, third = service.sessions()
    first.close()
    service.until(lambda: any("worker 0 is gone" in n for n in service.notices[1]))
    second.request_state(0, giver=0)
    assert service.until(third.take_state_requests)


def test_another_worker_gives_its_state_if_the_named_one_is_lost_meanwhile(serve: Serve) -> None:
    service = serve(3)
    first, second, third = service.sessions()
    second.request_state(0, giver=0)
    service.until(first.take_state_requests)
    first.close()
    assert service.until(third.take_state_requests)
