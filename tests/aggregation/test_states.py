"""Who gets whose variables."""

import itertools

import pytest

from tf_syncdist.aggregation.manifests import Variable
from tf_syncdist.aggregation.rounds import RoundError
from tf_syncdist.aggregation.states import States

MODEL = [Variable("kernel", "float32", (2,))]
OTHER = [Variable("kernel", "float32", (3,))]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_verdict_comes_with_the_last_manifest(order: tuple[int, ...]) -> None:
    states = States(3)
    answers = [states.manifest(worker, 0, MODEL) for worker in order]
    assert answers == [(None, []), (None, []), ("", [])]


def test_a_difference_is_the_verdict() -> None:
    states = States(2)
    states.manifest(1, 0, OTHER)
    verdict, _ = states.manifest(0, 0, MODEL)
    assert "kernel (float32, shape [3]) on worker 1" in verdict


def test_chunks_that_come_early_are_kept_until_all_agree_and_relayed_in_order_then() -> None:
    states = States(2)
    states.manifest(0, 0, MODEL)
    assert not states.start_chunk(0, 0, b"a", False)
    assert not states.start_chunk(0, 0, b"b", False)
    assert states.manifest(1, 0, MODEL) == ("", [b"a", b"b"])
    assert states.start_chunk(0, 0, b"c", False)
    assert states.start_chunk(0, 0, b"d", False)


def test_models_built_later_are_agreed_on_separately() -> None:
    states = States(2)
    for run in (0, 7):
        assert states.manifest(0, run, MODEL) == (None, [])
    assert states.waiting_for() == {0: [1], 7: [1]}
    assert states.manifest(1, 7, MODEL) == ("", [])
    assert states.waiting_for() == {0: [1]}
    assert states.start_chunk(0, 7, b"a", False) and not states.start_chunk(0, 0, b"b", False)
    assert states.manifest(1, 0, MODEL) == ("", [b"b"])
    assert states.waiting_for() == {}


def test_only_worker_0_gives_the_variables_at_the_start() -> None:
    with pytest.raises(RoundError, match="worker=1, run=3"):
        States(2).start_chunk(1, 3, b"a", False)


def test_a_worker_that_left_is_not_waited_for() -> None:
    states = States(3)
    states.manifest(0, 0, MODEL)
    states.start_chunk(0, 0, b"a", False)
    states.manifest(1, 0, MODEL)
    assert states.waiting_for() == {0: [2]}
    assert states.leave(2) == [(0, "", [b"a"])]
    assert states.leave(2) == []
    assert states.manifest(0, 9, MODEL) == (None, [])
    assert states.manifest(1, 9, MODEL) == ("", [])


def test_what_a_leaver_was_about_to_train_still_counts() -> None:
    states = States(3)
    states.manifest(0, 0, MODEL)
    states.manifest(2, 0, OTHER)
    assert states.leave(2) == []
    verdict, _ = states.manifest(1, 0, MODEL)
    assert "worker 2" in verdict


def test_without_worker_0_nobody_waits_for_its_variables() -> None:
    """The variables come from worker 0, so the others can only be told that they do not come."""
    states = States(3)
    states.manifest(1, 0, MODEL)
    verdicts = states.leave(0)
    verdict, chunks = states.manifest(2, 0, MODEL)
    verdicts += [(0, verdict, chunks)]
    errors = [error for run, error, _ in verdicts if run == 0 and error]
    assert errors and "worker 0" in errors[0]


def test_the_worker_that_is_furthest_gives_its_state() -> None:
    states = States(4)
    at = [3, 9, 9, 1]
    assert states.request(3, [0, 1, 2, 3], at.__getitem__) == (1, 1)
    assert states.request(3, [0, 2, 3], at.__getitem__) == (2, 2)
    assert states.request(0, [0, 3], at.__getitem__) is None
    assert states.request(1, [2], at.__getitem__) is None, "as far is not further"


def test_a_state_goes_to_whom_it_is_for_until_its_last_piece() -> None:
    states = States(3)
    at = [5, 0, 0]
    (first, _), (second, _) = (states.request(w, [0], at.__getitem__) for w in (1, 2))
    assert first != second
    assert states.chunk(0, first, last=False) == 1
    assert states.chunk(0, second, last=True) == 2
    assert states.chunk(0, first, last=True) == 1
    assert states.chunk(0, first, last=False) is None
    assert states.chunk(0, 99, last=False) is None


def test_only_the_worker_that_was_asked_gives_its_state() -> None:
    states = States(3)
    request, giver = states.request(2, [0, 1], [5, 4, 0].__getitem__)
    with pytest.raises(RoundError, match=f"request {request} from worker {giver}.*worker=1"):
        states.chunk(1, request, last=True)
    assert states.chunk(giver, request, last=True) == 2


def test_when_the_giver_is_lost_its_receivers_need_another() -> None:
    states = States(4)
    at = [9, 5, 0, 0]
    requests = [states.request(w, [0, 1], at.__getitem__)[0] for w in (2, 3)]
    other, _ = states.request(1, [0], at.__getitem__)
    assert sorted(r.receiver for r in states.drop(0)) == [1, 2, 3]
    assert [states.chunk(0, r, last=True) for r in (*requests, other)] == [None] * 3
    assert states.request(2, [1], at.__getitem__)[1] == 1


def test_when_the_receiver_is_lost_its_state_goes_nowhere() -> None:
    states = States(3)
    request, _ = states.request(2, [0], [5, 0, 0].__getitem__)
    assert states.drop(2) == []
    assert states.chunk(0, request, last=True) is None


def test_a_wanted_giver_is_asked_unless_it_is_behind_or_gone() -> None:
    states = States(4)
    at = [3, 9, 5, 3]
    workers = [0, 1, 2, 3]

    def giver(receiver: int, wanted: int, connected: list[int] = workers) -> int | None:
        found = states.request(receiver, connected, at.__getitem__, wanted, level_will_do=True)
        return found and found[1]

    assert giver(3, 2) == 2 and giver(3, 0) == 0, "as far will do"
    assert giver(2, 0) == 1, "behind"
    assert giver(3, 0, [1, 2, 3]) == 1, "gone"
    assert giver(3, 1, [0, 3]) == 0, "the next best is as far"
    assert giver(3, 3) == 1, "itself"
    assert giver(1, 0) is None


def test_the_next_giver_may_be_level_if_the_first_could_be() -> None:
    states = States(3)
    states.request(2, [0, 1], [0, 0, 0].__getitem__, 0, level_will_do=True)
    (request,) = states.drop(0)
    assert request == (2, 0, True)
