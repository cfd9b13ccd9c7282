"""Where an input pass of unknown length ends. Pure."""

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """An input pass ends: runs from `run` on do not take place in it."""

    input_pass: int
    run: int


class Asked(NamedTuple):
    """Workers are to vote for a run, unless they have begun it."""

    input_pass: int
    run: int
    workers: tuple[int, ...]


class Endings:
    """Decides where an input pass ends, from votes for runs that workers will not begin.

    A worker that runs out of input votes for its next run. The others go on without it as long as
    they are enough to close the round, unless the input is the same for all and they have some left
    only because they did not read all of it. When they do not go on, the pass ends after that round
    if one of them takes part in it, and before it if all promise not to.

    All workers end a pass at the same number of runs, so one pass is known at a time.

    Args:
        num_workers: How many workers the job has.
        replicas_to_aggregate: How many contributions close a round.
        begun: Tells how many runs a worker has surely begun.
    """

    def __init__(
        self, num_workers: int, replicas_to_aggregate: int, begun: Callable[[int], int]
    ) -> None:
        self._needed = replicas_to_aggregate
        self._begun = begun
        self._present = set(range(num_workers))
        self._pass = 0
        self._end: int | None = None
        self._votes: dict[int, set[int]] = {}
        self._lengths: set[int] = set()
        self._old_votes: dict[int, set[int]] = {}
        self._asked: dict[int, set[int]] = {}

    @property
    def end(self) -> Ended | None:
        """Where the newest pass ends, if that is decided."""
        return None if self._end is None else Ended(self._pass, self._end)

    def enter(self, input_pass: int) -> dict[int, Ended] | None:
        """Takes note that a worker takes no more input in earlier passes.

        So everything before the end of those is over, and what was voted in them has served.

        Returns:
            If the pass is new, where the last one ends for the workers that have voted in it and
            may wait for a decision; else `None`.
        """
        if input_pass <= self._pass:
            return None
        ended = {
            worker: Ended(self._pass, run)
            for run in sorted(self._votes, reverse=True)
            for worker in self._votes[run]
        }
        self._pass, self._end = input_pass, None
        self._old_votes, self._votes, self._asked = self._votes, {}, {}
        self._lengths = set()
        return ended

    def vote(self, worker: int, input_pass: int, run: int, is_length: bool = False) -> bool:
        """Takes note that a worker will not begin a run.

        Args:
            worker: Index of the worker.
            input_pass: Which iteration over the input.
            run: The run.
            is_length: Whether the input of all workers is known to end there.

        Returns:
            Whether the vote counts; it does not if it is for an older pass, or the worker has left.
        """
        if worker not in self._present or input_pass != self._pass:
            return False
        self._votes.setdefault(run, set()).add(worker)
        if is_length:
            self._lengths.add(run)
        return True

    def leave(self, worker: int) -> None:
        """Stops asking a worker; what it has voted does not count any more."""
        self._present.discard(worker)
        for workers in self._votes.values():
            workers.discard(worker)

    def come_back(self, worker: int) -> None:
        """Asks a worker again that had left; it has to say anew what it has voted."""
        self._present.add(worker)
        for workers in self._asked.values():
            workers.discard(worker)

    def restore(self, end: Ended) -> None:
        """Takes note of an end that workers have been told of."""
        if end.input_pass == self._pass:
            self._end = end.run if self._end is None else min(self._end, end.run)

    def forget(self, over: int) -> None:
        """Forgets votes for the runs before `over`, which are over: their voters replay them."""
        for run in [r for r in self._votes if r < over]:
            del self._votes[run]
            self._asked.pop(run, None)
        self._old_votes = {r: w for r, w in self._old_votes.items() if r >= over}

    def voters(self, run: int) -> set[int]:
        """Returns the workers that have voted for a run, in this pass or the last one."""
        return self._votes.get(run, set()) | self._old_votes.get(run, set())

    def asked(self, worker: int) -> list[Asked]:
        """Returns what a worker has been asked and not answered."""
        return [
            Asked(self._pass, run, (worker,))
            for run, workers in self._asked.items()
            if worker in workers and worker not in self._votes[run]
        ]

    def decide(self, over: int, published: Callable[[int], bool]) -> list[Ended | Asked]:
        """Decides what can be decided; ask after a vote, a contribution and a worker's leave.

        Args:
            over: How many runs are over. Votes for these are forgotten.
            published: Tells whether workers have been sent any result of a run.

        Returns:
            What to tell the workers, before any result that is published later.
        """
        self.forget(over)
        decisions = [self._decide(run, published) for run in sorted(self._votes)]
        return [d for d in decisions if d is not None]

    def _decide(self, run: int, published: Callable[[int], bool]) -> Ended | Asked | None:
        voters = self._votes[run]
        remaining = self._present - voters
        if not voters or (self._end is not None and self._end <= run):
            return None
        if not remaining:
            # Also if the end was to be after this run: whoever had begun it is gone.
            self._end = run
            return Ended(self._pass, run)
        goes_on = len(remaining) >= self._needed and run not in self._lengths
        if self._end is not None or goes_on:
            return None
        if any(self._begun(w) > run for w in remaining):
            if published(run):
                # Who has a result may be past the run, and the voters will be told that it is over.
                return None
            self._end = run + 1
            return Ended(self._pass, run + 1)
        asked = self._asked.setdefault(run, set())
        workers = tuple(sorted(remaining - asked))
        asked.update(workers)
        return Asked(self._pass, run, workers) if workers else None
