"""Where training stops, and where input of unknown length ends, for one worker."""

from collections.abc import Callable

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.exchanges import Exchanging
from tf_syncdist.transport.session_config import SessionConfig


class Ending(Exchanging):
    """The part of a session that is about the end: of a training, an input pass and the job.

    An *input pass* is one iteration of the job over its training input. All workers count passes
    alike from 0, and all of them end a pass at the same number of runs.

    TensorFlow's threads call these methods, perhaps for a run ahead of the one in progress.
    """

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        self._job_over: tuple[int, int] | None = None
        self._stops: dict[int, int] = {}
        self._stop_sayers: dict[int, int] = {}
        self._wish: pb.StopWish | None = None
        self._epoch = pb.EpochBegun()
        self._begun = 0
        # Older passes are done with.
        self._pass = 0
        self._ends: dict[int, int] = {}
        self._promised: set[tuple[int, int]] = set()
        self._lengths: set[tuple[int, int]] = set()

    # The end of training.

    def job_over_at(self) -> tuple[int, int] | None:
        """Returns the run from which the job is over and the worker that said so, or `None`."""
        with self._changed:
            return self._job_over

    def wish_stop(self, fit: int, run: int) -> None:
        """Wishes that training stops; the service decides where, and tells every worker.

        Args:
            fit: Which training, counted alike by every worker.
            run: How many runs this worker has done.
        """
        with self._changed:
            self._wish = pb.StopWish(fit=fit, run=run)
            self._send_first(pb.ToAggregator(stop_wish=self._wish))

    def begin_epoch(self, fit: int, epoch: int, run: int) -> None:
        """Says where the job is, for workers that come back.

        Args:
            fit: Which training, counted alike by every worker.
            epoch: Which epoch of it.
            run: How many runs were done before.
        """
        with self._changed:
            self._epoch = pb.EpochBegun(fit=fit, epoch=epoch, run=run)
            self._send_first(pb.ToAggregator(epoch_begun=self._epoch))

    def stop_at(self, fit: int) -> int | None:
        """Returns after how many runs a training stops, or `None` as long as nobody wishes it.

        A worker knows before it finishes the last run.
        """
        with self._changed:
            self._check()
            return self._stops.get(fit)

    # The end of input.

    def enter_run(self, input_pass: int, run: int) -> bool:
        """Asks whether this worker may take input for a run, before it does.

        If this worker has promised not to begin the run, this waits until the pass is known to end
        there, or the run is over without it.

        Args:
            input_pass: Which iteration over the input.
            run: The run.

        Returns:
            Whether it may. If not, the pass has ended before the run.
        """
        with self._changed:
            self._check()
            self._enter(input_pass)

            def settled() -> bool:
                return (input_pass, run) not in self._promised or self._is_settled(input_pass, run)

            # Not while a run is in progress: its thread answers for itself.
            self._wait(
                settled,
                f"the end of round {run}, which it had promised not to begin, or of the input",
                gives_state=lambda: run <= self._finished,
            )
            if self._has_ended(input_pass, run):
                return False
            self._begun = max(self._begun, run + 1)
            return True

    def begin_run(self, run: int) -> None:
        """Takes note that this worker begins a run with input of known length."""
        with self._changed:
            self._begun = max(self._begun, run + 1)

    def vote_end(self, input_pass: int, run: int, is_length: bool = False) -> bool:
        """Says that this worker has no input for a run, and waits for what comes of it.

        Args:
            input_pass: Which iteration over the input.
            run: The run.
            is_length: Whether the input is the same for all workers, and known to end there.

        Returns:
            Whether the pass ends here. If not, the run is over without this worker, which is to
            replay it.
        """
        with self._changed:
            self._check()
            self._enter(input_pass)
            if not self._is_settled(input_pass, run):
                self._promise(input_pass, run, is_length)
            self._wait(
                lambda: self._is_settled(input_pass, run),
                f"the end of round {run}, for which it has no input, or of the others' input",
                gives_state=lambda: run <= self._finished,
            )
            return self._has_ended(input_pass, run) or not self._is_over(run)

    def end_of(self, input_pass: int) -> int | None:
        """Returns the run before which an input pass ends, or `None` if that is not decided.

        It is known before the last run of the pass can be finished.
        """
        with self._changed:
            self._check()
            return self._ends.get(input_pass)

    def leave_pass(self, input_pass: int) -> None:
        """Takes note that this worker takes no more input in a pass, and ends its waits for it."""
        with self._changed:
            self._enter(input_pass + 1)

    # How.

    def _enter(self, input_pass: int) -> None:
        if input_pass > self._pass:
            self._pass = input_pass
            self._send_all(pb.ToAggregator(enter_pass=pb.EnterPass(input_pass=input_pass)))
            self._promised = {k for k in self._promised if k[0] >= input_pass}
            # The last end may still be asked for while the next pass is being prefetched.
            self._ends = {p: e for p, e in self._ends.items() if p >= input_pass - 1}
            self._lengths = {k for k in self._lengths if k[0] >= input_pass}
            self._changed.notify_all()

    def _has_ended(self, input_pass: int, run: int) -> bool:
        end = self._ends.get(input_pass)
        return input_pass < self._pass or (end is not None and end <= run)

    def _is_settled(self, input_pass: int, run: int) -> bool:
        """Returns whether nothing is left to wait for before a run that was promised away."""
        beyond = self._job_over is not None and run >= self._job_over[0]
        return beyond or self._has_ended(input_pass, run) or self._is_over(run)

    def _promise(self, input_pass: int, run: int, is_length: bool = False) -> None:
        self._promised = {k for k in self._promised if k[1] >= self._finished}
        self._promised.add((input_pass, run))
        if is_length:
            self._lengths.add((input_pass, run))
        # Sending only queues, so this can be done with the lock held, and by the receiving thread.
        vote = pb.EndVote(input_pass=input_pass, run=run, is_length=is_length)
        self._send_all(pb.ToAggregator(end_vote=vote))

    def _on_job_over(self, shard: int, message: pb.JobOver, *_: object) -> None:
        self._job_over = (message.run, message.worker)

    def _on_stop_at(self, shard: int, message: pb.StopAt, *_: object) -> None:
        self._stops.setdefault(message.fit, message.run)
        self._stop_sayers.setdefault(message.fit, message.worker)

    def _on_end_proposal(self, shard: int, message: pb.EndProposal, *_: object) -> None:
        # Who has begun the run is going to contribute to it, which answers the proposal too.
        begun = max(self._begun, self._finished)
        if message.input_pass >= self._pass and message.run >= begun:
            self._promise(message.input_pass, message.run)

    def _on_end_of_data(self, shard: int, message: pb.EndOfData, *_: object) -> None:
        known = self._ends.get(message.input_pass, message.run)
        self._ends[message.input_pass] = min(known, message.run)

    def _stand(self, shard: int, standing: pb.Standing) -> None:
        super()._stand(shard, standing)
        if self._job_over is not None:
            standing.job_over.run, standing.job_over.worker = self._job_over
        for fit, run in self._stops.items():
            standing.stops.add(fit=fit, run=run, worker=self._stop_sayers[fit])
        for input_pass, run in self._ends.items():
            standing.ends.add(input_pass=input_pass, run=run)
        standing.input_pass = self._pass
        standing.epoch.CopyFrom(self._epoch)

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        super()._resend(shard, welcome, is_new)
        self._send(shard, pb.ToAggregator(enter_pass=pb.EnterPass(input_pass=self._pass)))
        for input_pass, run in sorted(self._promised):
            if not self._is_settled(input_pass, run):
                is_length = (input_pass, run) in self._lengths
                vote = pb.EndVote(input_pass=input_pass, run=run, is_length=is_length)
                self._send(shard, pb.ToAggregator(end_vote=vote))
        if not shard:
            self._send_first(pb.ToAggregator(epoch_begun=self._epoch))
            if self._wish is not None and self._wish.fit not in self._stops:
                self._send_first(pb.ToAggregator(stop_wish=self._wish))
