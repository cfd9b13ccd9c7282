"""Where an input pass of unknown length ends."""

from tf_syncdist.aggregation.endings import Asked, Ended, Endings


class Job:
    """Endings of workers whose runs are set by hand."""

    def __init__(self, num_workers: int, needed: int) -> None:
        self.begun = [0] * num_workers
        self.over = 0
        self.published: set[int] = set()
        self.endings = Endings(num_workers, needed, lambda worker: self.begun[worker])

    def decide(self) -> list[Ended | Asked]:
        """Asks for decisions."""
        return self.endings.decide(self.over, lambda run: run in self.published)

    def vote(
        self, worker: int, run: int, input_pass: int = 0, is_length: bool = False
    ) -> list[Ended | Asked]:
        """Lets a worker vote; returns what comes of it."""
        assert self.endings.vote(worker, input_pass, run, is_length)
        return self.decide()

    def begin(self, worker: int, run: int) -> list[Ended | Asked]:
        """Lets a worker contribute to a run; returns what comes of it."""
        self.begun[worker] = run + 1
        return self.decide()


def test_as_long_as_enough_have_input_they_go_on() -> None:
    job = Job(4, needed=2)
    assert job.vote(3, 5) == [] and job.vote(0, 5) == []
    assert job.begin(1, 5) == [] and job.begin(2, 5) == []
    assert job.endings.end is None


def test_where_all_read_the_same_a_length_ends_the_pass_for_all() -> None:
    job = Job(4, needed=2)
    assert job.vote(3, 5, is_length=True) == [Asked(0, 5, (0, 1, 2))]
    job.vote(0, 5)
    job.vote(1, 5)
    assert job.vote(2, 5) == [Ended(0, 5)]
    job.endings.enter(1)
    # What was known of the last pass says nothing about the next one.
    assert job.vote(3, 5, input_pass=1) == []


def test_when_too_few_remain_each_of_them_is_asked_once() -> None:
    job = Job(4, needed=3)
    assert job.vote(3, 5) == []
    assert job.vote(0, 5) == [Asked(0, 5, (1, 2))]
    assert job.decide() == []
    assert job.endings.asked(1) == [Asked(0, 5, (1,))] and job.endings.asked(0) == []
    assert job.vote(1, 5) == [] and job.endings.asked(1) == []
    assert job.vote(2, 5) == [Ended(0, 5)]
    assert job.endings.end == Ended(0, 5)
    assert job.vote(2, 5) == []


def test_a_run_that_somebody_has_begun_is_the_last_one() -> None:
    job = Job(3, needed=3)
    job.begin(1, 5)
    assert job.vote(0, 5) == [Ended(0, 6)]
    assert job.begin(2, 5) == []


def test_who_was_asked_may_have_begun_the_run() -> None:
    job = Job(3, needed=2)
    job.vote(0, 5)
    assert job.vote(1, 5) == [Asked(0, 5, (2,))]
    assert job.begin(2, 5) == [Ended(0, 6)]


def test_workers_that_leave_make_too_few() -> None:
    job = Job(4, needed=2)
    job.vote(0, 5)
    job.vote(1, 5)
    job.endings.leave(2)
    assert job.decide() == [Asked(0, 5, (3,))]
    job.endings.leave(3)
    assert job.decide() == [Ended(0, 5)]
    assert not job.endings.vote(3, 0, 5)


def test_the_vote_of_who_leaves_does_not_count() -> None:
    job = Job(3, needed=2)
    job.vote(0, 5)
    job.endings.leave(0)
    assert job.decide() == []
    assert job.begin(1, 5) == []
    assert job.endings.end is None


def test_nobody_waits_for_a_run_that_was_begun_by_who_is_gone() -> None:
    job = Job(3, needed=3)
    job.begin(1, 5)
    assert job.vote(0, 5) == [Ended(0, 6)]
    assert job.vote(2, 5) == []
    job.endings.leave(1)
    assert job.decide() == [Ended(0, 5)]
    assert job.endings.end == Ended(0, 5)


def test_a_run_with_results_is_going_to_be_over_for_all() -> None:
    """Who has them may be in the next run, which must then be allowed to take place."""
    job = Job(3, needed=2)
    job.begin(0, 5)
    job.begin(1, 5)
    job.published.add(5)
    job.vote(2, 5)
    job.endings.leave(1)
    assert job.decide() == []
    job.over = 6
    assert job.decide() == []
    assert job.vote(2, 6) == [Asked(0, 6, (0,))]


def test_votes_for_runs_that_are_over_decide_nothing() -> None:
    job = Job(2, needed=2)
    job.over = 6
    assert job.vote(0, 5) == [] and job.vote(1, 5) == []
    assert job.endings.end is None


def test_the_next_pass_begins_anew_and_the_old_one_is_forgotten() -> None:
    job = Job(2, needed=2)
    job.vote(0, 5)
    assert job.vote(1, 5) == [Ended(0, 5)]
    assert not job.endings.vote(0, 1, 5), "nobody is in it"
    assert job.endings.enter(1) == {0: Ended(0, 5), 1: Ended(0, 5)}
    assert job.endings.enter(1) is None and job.endings.enter(0) is None
    assert job.endings.end is None
    assert job.vote(0, 5, input_pass=1) == [Asked(1, 5, (1,))]
    assert not job.endings.vote(1, 0, 5)
    assert job.decide() == []
    assert job.vote(1, 5, input_pass=1) == [Ended(1, 5)]


def test_who_waits_in_a_pass_that_others_have_left_is_released_at_its_first_vote() -> None:
    job = Job(4, needed=2)
    job.vote(0, 5)
    job.vote(1, 7)
    job.vote(0, 7)
    assert job.endings.enter(3) == {0: Ended(0, 5), 1: Ended(0, 7)}
