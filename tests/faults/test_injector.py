"""Faults as data, and how they are drawn; no processes."""

import pytest

from .injector import CUT, KILL, RESET, STOP, Agenda, Chaos, Fault, Faults, View


def view(now: float = 0.0, sound: str = "0123", services: str = "0", **rounds: int) -> View:
    return View(
        now,
        {f"worker {name[1:]}": done for name, done in rounds.items()},
        frozenset(f"worker {w}" for w in sound),
        frozenset(f"ps {s}" for s in services),
    )


def test_faults_are_said_in_the_order_in_which_they_are_read() -> None:
    faults = (
        Faults()
        .kill(worker=1, at_round=7)
        .restart(after_seconds=2.0)
        .stop(worker=2, at_round=9, seconds=5)
        .kill(ps=0, at_round=12)
        .cut(worker=1, at_round=15, seconds=4)
        .reset(worker=3, at_round=1)
    )
    assert faults.planned == [
        Fault(KILL, "worker 1", 7, restart_seconds=2.0),
        Fault(STOP, "worker 2", 9, 5),
        Fault(KILL, "ps 0", 12),
        Fault(CUT, "worker 1", 15, 4),
        Fault(RESET, "worker 3", 1),
    ]


def test_only_what_was_killed_is_restarted() -> None:
    with pytest.raises(AssertionError, match="a restart follows a kill"):
        Faults().stop(worker=1, at_round=1, seconds=1).restart()
    with pytest.raises(AssertionError, match="a worker or to a ps task"):
        Faults().kill(worker=1, ps=0, at_round=1)


def test_a_fault_happens_once_in_its_own_round() -> None:
    faults = Faults().kill(worker=1, at_round=2).restart().kill(worker=1, at_round=2)
    assert faults.due(view(w0=5, w1=1)) == [] and not faults.is_over
    assert [f.restart_seconds for f in faults.due(view(w0=5, w1=2))] == [0.3]
    assert faults.due(view(w0=6)) == []
    assert [f.restart_seconds for f in faults.due(view(w0=9, w1=8))] == [None]
    assert faults.is_over and faults.due(view(w0=9, w1=9)) == []


def test_a_fault_can_wait_for_others_to_be_sound() -> None:
    faults = Faults().kill(worker=0, at_round=2).sparing(2)
    assert faults.due(view(sound="0", w0=5)) == []
    assert faults.due(view(sound="01", w0=5, w1=4)) == []
    assert len(faults.due(view(sound="12", w0=5, w1=4, w2=5))) == 1


def test_a_worker_that_is_killed_now_does_not_spare_another() -> None:
    faults = Faults().kill(worker=0, at_round=2).kill(worker=2, at_round=4).sparing(1)
    assert [f.task for f in faults.due(view(sound="02", w0=9, w2=9))] == ["worker 0"]
    assert faults.due(view(sound="2", w2=9)) == []
    assert [f.task for f in faults.due(view(sound="12", w1=9, w2=9))] == ["worker 2"]


def test_a_service_has_done_what_the_foremost_worker_has() -> None:
    faults = Faults().kill(ps=0, at_round=4)
    assert faults.due(view(w0=3, w1=1)) == []
    assert faults.due(view(w0=4, w1=1, services="")) == []
    assert len(faults.due(view(w0=4, w1=1))) == 1


def test_chaos_leaves_enough_workers_and_ends() -> None:
    chaos = Chaos(1, seconds=20.0, every_seconds=1.0)
    assert chaos.due(view(0.5, sound="01", w0=1, w1=1)) == []
    happened = []
    for tick in range(2100):
        happened += chaos.due(view(tick / 100, sound="012", w0=1, w1=1, w2=1))
    assert happened == chaos.happened and chaos.is_over
    assert 12 < len(happened) < 42
    assert {f.action for f in happened} == {KILL, STOP, CUT, RESET}
    assert {f.task for f in happened} == {"worker 0", "worker 1", "worker 2"}
    assert all(f.restart_seconds is not None for f in happened if f.action == KILL)


def test_chaos_is_the_same_again_with_the_same_seed() -> None:
    def draw(seed: int) -> list[Fault]:
        chaos = Chaos(seed, seconds=9.0, kills_services=True)
        return [f for tick in range(90) for f in chaos.due(view(tick / 10, w0=1))]

    assert draw(3) == draw(3) != draw(4)
    assert any(f.task == "ps 0" for seed in range(5) for f in draw(seed))


def test_an_agenda_forgets_nothing() -> None:
    agenda, done = Agenda(), []
    for at in range(100):
        agenda.add(at / 10, lambda at=at: done.append(at))
    for now in (0.05, 0.1, 3.14159, 3.2, 9.9, 20.0):
        for act in agenda.due(now):
            act()
    assert done == list(range(100))
