"""The end of input of unknown length, by a real service over real sockets."""

import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.errors import SyncDistError
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
SPECS = [TensorSpec("float32", (4,))] * 3


class Program:
    """A program that trains on input of which nobody knows the length.

    Args:
        session: The session.
        lengths: For every input pass, for how many runs this worker has input.
        before: Called with a run before this worker begins it with input.
    """

    def __init__(
        self,
        session: Session,
        lengths: Sequence[int],
        before: Callable[[int], object] = lambda run: None,
    ) -> None:
        self.session = session
        self.lengths = lengths
        self.before = before
        self.run = 0
        self.results: list[bytes] = []
        self.contributors: list[int | None] = []
        self.ends: list[int] = []
        self.way = plan(SPECS, 16, len(session.config.addresses))

    def train(self) -> None:
        """Goes through all passes."""
        for input_pass, length in enumerate(self.lengths):
            for _ in range(length):
                self.before(self.run)
                if not self.session.enter_run(input_pass, self.run):
                    break
                self.do_run()
            else:
                while not self.session.vote_end(input_pass, self.run):
                    assert self.session.exchanges_of(self.run) is not None
                    self.do_run()
            self.ends.append(self.run)

    def do_run(self) -> None:
        """Does a run as the controller does; replays it if it is over."""
        over = self.session.exchanges_of(self.run) is not None
        if over:
            assert self.session.wait_results(self.run)
        else:
            rng = np.random.default_rng((self.session.config.worker, self.run))
            mine = [rng.normal(size=s.shape).astype("f4") for s in SPECS]
            self.session.send(self.run, 0, self.way, mine)
        arrays = [np.empty(s.shape, "f4") for s in SPECS]
        used, total = self.session.receive(self.run, 0, self.way, arrays)
        fate = Fate.REPLAYED if over else Fate.LATE if used < total else Fate.CONTRIBUTED
        self.session.finish(self.run, 1, fate)
        self.results.append(b"".join(a.tobytes() for a in arrays))
        self.run += 1


def train(service: object, programs: list[Program]) -> list[int]:
    """Lets programs train; returns where all of their passes ended, alike."""
    service.together(*(p.train for p in programs))
    first = programs[0]
    for program in programs:
        assert program.ends == first.ends
        assert program.results == first.results
        assert len(program.results) == first.ends[-1]
    return first.ends


def programs(service: object, *lengths: Sequence[int]) -> list[Program]:
    """One program per worker."""
    return [Program(s, n) for s, n in zip(service.sessions(), lengths, strict=True)]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "lengths, b, end",
    [
        ((3, 3), 0, 3),
        ((3, 5), 0, 3),
        ((0, 5, 9), 0, 0),
        ((3, 5, 9), 1, 5),
        ((9, 3, 3), 1, 3),
        ((2, 4, 6, 8), 2, 6),
        ((1, 1, 7), 2, 7),
        ((4,), 0, 4),
    ],
)
def test_a_pass_ends_alike_for_all_when_too_few_have_input(
    serve: Serve, lengths: tuple[int, ...], b: int, end: int, shards: int
) -> None:
    """At most one run later, if one of the few had begun it."""
    service = serve(len(lengths), b=b, shards=shards)
    (found,) = train(service, programs(service, *([n] for n in lengths)))
    assert found in (end, end + 1)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_many_passes_of_workers_with_unequal_input(serve: Serve, seed: int, shards: int) -> None:
    rng = random.Random(seed)
    num_workers = rng.randint(2, 4)
    b = rng.randrange(num_workers)
    service = serve(num_workers, b=b, shards=shards)
    lengths = [[rng.randrange(6) for _ in range(12)] for _ in range(num_workers)]
    jobs = programs(service, *lengths)
    for job in jobs:
        dice = random.Random(rng.random())
        job.before = lambda run, dice=dice: time.sleep(dice.choice((0, 0, 0.002)))
    start = 0
    for ends, in_pass in zip(train(service, jobs), zip(*lengths, strict=True), strict=True):
        needed = sorted(in_pass, reverse=True)[num_workers - b - 1]
        assert ends - start in (needed, needed + 1)
        start = ends
    for session in (j.session for j in jobs):
        assert len(session._ends) <= 2 and len(session._promised) <= 12


def test_a_run_that_was_begun_takes_place(serve: Serve) -> None:
    """Worker 0 runs out when worker 1 has contributed to run 3 already."""
    service = serve(2)
    first, second = programs(service, [3], [9])
    vote = first.session.vote_end

    def vote_late(input_pass: int, run: int) -> bool:
        service.until(lambda: service.servers[0].job._rounds.begun(1) > run or first.run > 3)
        return vote(input_pass, run)

    first.session.vote_end = vote_late
    assert train(service, [first, second]) == [4]
    assert first.session.end_of(0) == second.session.end_of(0) == 4


@pytest.mark.parametrize("shards", [1, 2])
def test_a_promise_is_kept_until_the_pass_ends(serve: Serve, shards: int) -> None:
    """Worker 1 has input, and is asked before it begins run 3. The next pass begins with that."""
    service = serve(2, shards=shards)
    first, second = programs(service, [3, 2], [9, 2])

    def before(run: int) -> None:
        if run == 3:
            service.until(lambda: second.session.end_of(0) is not None)

    second.before = before
    assert train(service, [first, second]) == [3, 5]
    for server in service.servers:
        # The last worker may still be about to say that it has done the last run.
        service.until(
            lambda job=server.job: [w.contributed for w in job.report().workers] == [5, 5]
        )
        assert server.job.report().rounds == 5


@pytest.mark.parametrize("shards", [1, 2])
def test_nobody_waits_for_the_promise_of_a_straggler(serve: Serve, shards: int) -> None:
    service = serve(3, b=1, shards=shards)
    first, second, slow = programs(service, [3, 2], [3, 2], [9, 9])
    go = threading.Event()
    slow.before = lambda run: run != 1 or go.wait(20)
    first.before = lambda run: run != 1 or service.until(lambda: slow.run == 1)

    def lead() -> None:
        service.together(first.train, second.train)
        assert slow.run == 1
        go.set()

    # With b = 1 the others need the straggler in the second pass no more than in the first.
    service.together(lead, slow.train)
    assert first.ends == second.ends == slow.ends == [3, 5]
    assert slow.results == first.results == second.results


def test_who_has_promised_a_run_that_takes_place_replays_it(serve: Serve) -> None:
    """Worker 0 runs out; worker 1 promises, and worker 2 has begun the run."""
    service = serve(3)
    first, second, third = programs(service, [], [], [])
    third.session.begin_run(0)
    entered = []

    def run_out() -> None:
        assert not first.session.vote_end(0, 0)
        first.do_run()

    def promise() -> None:
        service.until(lambda: second.session._promised)
        entered.append(second.session.enter_run(0, 0))
        second.do_run()

    def begin() -> None:
        assert third.session.enter_run(0, 0)
        service.until(lambda: second.session._promised)
        time.sleep(0.1)
        assert not entered, "it waits for the round to be over"
        third.do_run()

    service.together(run_out, promise, begin)
    assert entered == [True]
    assert first.results == second.results == third.results
    assert [s.session.end_of(0) for s in (first, second, third)] == [1] * 3


def test_a_run_in_the_hands_of_a_prefetcher_is_begun(serve: Serve) -> None:
    service = serve(2)
    first, second = (p.session for p in programs(service, [], []))
    second.begin_run(1)
    voted = threading.Thread(target=first.vote_end, args=(0, 1))
    voted.start()
    service.until(lambda: service.servers[0].job._ends._endings.asked(1))
    time.sleep(0.1)
    assert not second._promised and second.enter_run(0, 1)
    first.leave_pass(0)
    voted.join(10)
    assert not voted.is_alive()


def test_a_voter_that_is_lost_is_not_missed(serve: Serve) -> None:
    service = serve(3, b=0)
    first, second, third = programs(service, [2], [4], [4])
    third.before = lambda run: run == 2 and third.session.close()

    def die() -> None:
        with pytest.raises(SyncDistError):
            third.train()

    service.together(first.train, second.train, die)
    assert first.ends == second.ends and first.ends[0] in (2, 3)
    assert first.results == second.results


def test_a_run_begun_by_a_worker_that_is_lost_does_not_hang_the_others(serve: Serve) -> None:
    service = serve(3, b=0)
    first, second, third = programs(service, [0], [0], [1])
    assert third.session.enter_run(0, 0)
    third.session.send(0, 0, third.way, [np.ones(4, "f4")] * 3)
    service.until(lambda: service.servers[0].job._rounds.begun(2))

    def lose() -> None:
        service.until(lambda: first.session.end_of(0) == 1)
        third.session.close()

    service.together(first.train, second.train, lose)
    assert first.ends == second.ends == [0]
    # Run 0 takes place in the next pass.
    first.lengths = second.lengths = []
    service.together(first.do_run, second.do_run)
    assert first.results == second.results


@pytest.mark.parametrize("shards", [1, 2])
def test_runs_without_exchange_do_not_keep_a_voter_waiting(serve: Serve, shards: int) -> None:
    """Where gradients are accumulated the others may be some runs ahead of it."""
    service = serve(2, shards=shards)
    first, second = programs(service, [], [])

    def run_out() -> None:
        for run in range(3):
            assert not first.session.vote_end(0, run)
            assert first.session.exchanges_of(run) == (run == 2)
            if run < 2:
                first.session.finish(run, 0, Fate.REPLAYED)
        first.run = 2
        first.do_run()
        assert first.session.vote_end(0, 3)

    def go_on() -> None:
        for run in range(2):
            second.session.enter_run(0, run)
            second.session.finish(run, 0, Fate.CONTRIBUTED)
        assert second.session.enter_run(0, 2)
        second.run = 2
        second.do_run()
        assert not second.session.enter_run(0, 3)

    for run in range(3):
        second.session.begin_run(run)
    service.together(run_out, go_on)
    assert first.results == second.results


def test_a_job_that_is_over_does_not_wait_for_votes(serve: Serve) -> None:
    service = serve(3, b=1)
    first, second, _ = sessions = service.sessions()
    answers = []
    waits = threading.Thread(target=lambda: answers.append(first.vote_end(0, 5)))
    waits.start()
    second.goodbye(pb.FINISHED, 1)
    waits.join(10)
    assert answers == [True]
    assert all(s.enter_run(1, 7) for s in sessions), "runs do nothing from here on"


@pytest.mark.parametrize("wait", ["vote", "enter"])
def test_cancel_ends_the_waits_for_input(serve: Serve, wait: str) -> None:
    session, _, other = serve(3, b=1).sessions()
    if wait == "enter":
        with session._changed:
            session._promise(0, 0)
    threading.Timer(0.1, session.cancel, (KeyError("mine"),)).start()
    with pytest.raises(KeyError, match="mine"):
        session.vote_end(0, 0) if wait == "vote" else session.enter_run(0, 0)
    other.close()


def test_a_worker_that_runs_out_gives_its_state_meanwhile(serve: Serve) -> None:
    service = serve(3, b=1)
    first, second, third = service.sessions()
    given = threading.Event()

    def give() -> None:
        for request in first.take_state_requests():
            first.give_state(request, 0, [np.ones(2, "f4")])
            given.set()

    first.on_state_request = give
    waits = threading.Thread(target=first.vote_end, args=(0, 0))
    waits.start()
    second.request_state(0, giver=0)
    state = second.receive_state([("v", "float32", (2,))])
    assert given.is_set() and state.run == 0 and state.values[0].tolist() == [1, 1]
    first.leave_pass(0)
    waits.join(10)
    assert not waits.is_alive() and not third.has_failed


def test_a_worker_that_leaves_a_pass_early_releases_those_that_wait_in_it(serve: Serve) -> None:
    """It had taken input for a run that it does not do."""
    service = serve(2)
    first, second = programs(service, [0, 1], [])
    assert second.session.enter_run(0, 0)

    def leave() -> None:
        service.until(lambda: service.servers[0].job._ends._endings.asked(1))
        assert second.session.enter_run(1, 0)
        second.do_run()
        assert second.session.vote_end(1, 1)

    service.together(first.train, leave)
    assert first.ends == [0, 1] and first.results == second.results


@pytest.mark.parametrize("shards", [1, 2])
def test_a_worker_that_is_taken_past_a_run_need_not_wait_for_it(serve: Serve, shards: int) -> None:
    service = serve(2, b=1, shards=shards)
    first, second = programs(service, [], [])
    with second.session._changed:
        second.session._promise(0, 5)
    for _ in range(9):
        first.do_run()
    service.until(lambda: second.session.exchanges_of(8) is not None)
    second.session.resume(9, 9)
    assert second.session.enter_run(0, 5)
    assert not second.session.vote_end(0, 5)
    assert second.session.end_of(0) is None
