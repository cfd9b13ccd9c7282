"""Tells workers where trainings, input passes and the job end. One lock of the job's guards it."""

from collections.abc import Callable, Iterable

from tf_syncdist.aggregation.endings import Ended, Endings
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.proto import tf_syncdist_pb2 as pb


class EndRelay:
    """What is decided about ends.

    The first shard has a part of every exchange, so it decides alone.

    Args:
        num_workers: How many workers the job has.
        rounds: The rounds.
        streams: The connected workers.
        closed: Tells whether workers have been sent any result of a run.
        decides: Whether this is the first shard.
        on_event: Called with one line for the service's log.
    """

    def __init__(
        self,
        num_workers: int,
        rounds: Rounds,
        streams: Streams,
        closed: Callable[[int], bool],
        decides: bool,
        on_event: Callable[[str], None],
    ) -> None:
        self._endings = Endings(num_workers, rounds.replicas_to_aggregate, rounds.begun)
        self._rounds = rounds
        self._streams = streams
        self._closed = closed
        self._decides = decides
        self._on_event = on_event
        # For every training that is stopped, the number of runs and who wished it.
        self._stops: dict[int, tuple[int, int]] = {}
        self._over_at: tuple[int, int] | None = None
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether a worker's program is done, and the job with it."""
        return self._is_over

    # What a worker says.

    def wish_stop(self, worker: int, fit: int, run: int) -> None:
        """Decides where a training stops of which a worker wishes that."""
        if fit in self._stops or not self._decides:
            return
        self._stops[fit] = (self._rounds.end(run), worker)
        stop, _ = self._stops[fit]
        self._on_event(f"worker {worker} stops training {fit} after {stop} run(s)")
        # Nothing is closed yet in the last run before the stop, and what is closed later stands
        # behind this in every outbox. So nobody can finish that run without knowing of the stop.
        self._streams.tell_all(self._stop_at(fit))

    def finished(self, worker: int, run: int) -> None:
        """Takes note that a worker's program is done, and the job with it."""
        self._is_over = True
        # A program that ends before its first run says nothing about how long the job is.
        if run and self._decides:
            end = (self._rounds.end(run), worker)
            self._over_at = min(end, self._over_at or end)
            self._streams.tell_all(self._job_over())

    def vote(self, worker: int, message: pb.EndVote) -> bool:
        """Takes note of a vote; returns whether no value is to be expected from the worker."""
        self.enter_pass(message.input_pass)
        if not self._endings.vote(worker, message.input_pass, message.run, message.is_length):
            # Whoever is in a newer pass has not been in this run, unless it is over.
            if message.run >= self._rounds.runs_over and self._decides:
                self._streams.tell(worker, _end_of_data(Ended(message.input_pass, message.run)))
            return False
        return True

    def answer_vote(self, worker: int, run: int) -> None:
        """Tells a worker that has voted what is decided already."""
        self._tell_unsaid(worker, run)
        end = self._endings.end
        if end is not None:
            self._streams.tell(worker, _end_of_data(end))

    def enter_pass(self, input_pass: int) -> None:
        """Takes note that a worker takes no more input in earlier passes."""
        ended = self._endings.enter(input_pass)
        if ended is None:
            return
        self._rounds.forget_abstentions()
        # Another shard may hear of the new pass before it hears that the last runs are over.
        for worker, end in ended.items() if self._decides else ():
            self._streams.tell(worker, _end_of_data(end))

    # Consequences.

    def run_finished(self, run: int) -> None:
        """Takes note that a worker has finished a run."""
        for voter in self._endings.voters(run):
            self._tell_unsaid(voter, run)
        self._endings.forget(self._rounds.runs_over)
        self.decide()

    def decide(self) -> None:
        """Decides where an input pass ends; to be called before results are sent.

        So whoever finishes the last run of the pass has been told before.
        """
        if not self._decides:
            return
        for decision in self._endings.decide(self._rounds.runs_over, self._closed):
            if isinstance(decision, Ended):
                self._on_event(f"input pass {decision.input_pass} ends at run {decision.run}")
                self._streams.tell_all(_end_of_data(decision))
                continue
            for worker in decision.workers:
                self._streams.tell(worker, _end_proposal(decision.input_pass, decision.run))

    def enter(self, worker: int) -> None:
        """Takes note that a worker takes part again."""
        self._endings.come_back(worker)

    def leave(self, worker: int) -> None:
        """Takes note that a worker takes no part any more."""
        self._endings.leave(worker)

    def catch_up(self, worker: int) -> None:
        """Tells a worker that comes late what the others have been told."""
        tell = self._streams.tell
        if self._over_at is not None:
            tell(worker, self._job_over())
        for fit in self._stops:
            tell(worker, self._stop_at(fit))
        if self._endings.end is not None:
            tell(worker, _end_of_data(self._endings.end))
        for asked in self._endings.asked(worker):
            tell(worker, _end_proposal(asked.input_pass, asked.run))

    def restore(self, standings: Iterable[pb.Standing]) -> None:
        """Takes over from a service that is gone what workers were told."""
        for standing in standings:
            if standing.HasField("job_over"):
                self._is_over = True
                over = (standing.job_over.run, standing.job_over.worker)
                self._over_at = min(over, self._over_at or over)
            for stop in standing.stops:
                self._stops.setdefault(stop.fit, (stop.run, stop.worker))
            self._endings.enter(standing.input_pass)
            for end in standing.ends:
                self._endings.restore(Ended(end.input_pass, end.run))

    # How.

    def _tell_unsaid(self, worker: int, run: int) -> None:
        """Tells a worker that a run is over of which others are not told yet.

        A run without exchange is not said to be over while workers could compute it; who has no
        input for it cannot, and might be the one that the next exchange waits for.
        """
        if self._rounds.runs_announced <= run < self._rounds.runs_over:
            over = pb.RunOver(run=run, exchanges=0, sent=True)
            self._streams.tell(worker, pb.ToWorker(run_over=over))

    def _job_over(self) -> pb.ToWorker:
        run, worker = self._over_at
        return pb.ToWorker(job_over=pb.JobOver(run=run, worker=worker))

    def _stop_at(self, fit: int) -> pb.ToWorker:
        run, worker = self._stops[fit]
        return pb.ToWorker(stop_at=pb.StopAt(fit=fit, run=run, worker=worker))


def _end_of_data(end: Ended) -> pb.ToWorker:
    return pb.ToWorker(end_of_data=pb.EndOfData(input_pass=end.input_pass, run=end.run))


def _end_proposal(input_pass: int, run: int) -> pb.ToWorker:
    return pb.ToWorker(end_proposal=pb.EndProposal(input_pass=input_pass, run=run))
