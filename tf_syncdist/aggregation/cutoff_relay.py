"""Tells of cutoffs: plans to workers, rounds to the planner. One lock of the job's guards it."""

import math
from collections.abc import Callable

import numpy as np

from tf_syncdist.aggregation.admission import invalid
from tf_syncdist.aggregation.choices import Choices, Reasons
from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.aggregation.planning import Planning
from tf_syncdist.aggregation.records import Closed
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.cutoff import CutoffPolicy, Plan, RoundTimes, is_fixed
from tf_syncdist.proto import tf_syncdist_pb2 as pb

# Plans are for the next round, before which there may be runs without any exchange.
_RUNS_AHEAD = 2**16
_MOST_WORDS = 300


class CutoffRelay:
    """What is said and done about cutoffs besides closing slices.

    The first shard has a part of every exchange, so it plans for all; workers hand its plans on.

    Args:
        policy: The cutoff policy.
        is_planned: Whether it has a planner.
        rounds: The rounds.
        streams: The connected workers.
        num_shards: How many shards the job has.
        is_first: Whether this is the first one.
        on_event: Called with one line for the service's log.
    """

    def __init__(
        self,
        policy: CutoffPolicy,
        is_planned: bool,
        rounds: Rounds,
        streams: Streams,
        num_shards: int,
        is_first: bool,
        on_event: Callable[[str], None],
    ) -> None:
        self.planning: Planning | None = None
        self._policy = policy
        self._is_planned = is_planned
        self._rounds = rounds
        self._streams = streams
        self._tells_plans = is_planned and is_first and num_shards > 1
        self._is_first = is_first
        self._on_event = on_event
        self._choices = Choices()
        self._reasons = None if is_fixed(policy) else Reasons()
        # For how many rounds plans were told, and to whom it was said that the policy failed.
        self._told = -1
        self._failure_logged = self._failure_told = False

    def ended(self, times: tuple[RoundTimes, ...]) -> None:
        """Takes note of rounds that are over."""
        for one in times:
            if self._reasons is not None:
                self._choices.add(one, self._rounds.last_plan if self._is_planned else None)
            if self.planning is not None:
                self.planning.tell(one)

    def look(self, closed: tuple[Closed, ...], now: float) -> None:
        """Says what is to be said after anything that may have closed slices.

        Args:
            closed: The slices.
            now: Time, in seconds.
        """
        if self._rounds.cutoff.failure and not self._failure_told:
            self._tell_failure()
        if self._tells_plans and self._told != self._rounds.rounds:
            self._tell_plan()
        if closed and self._reasons is not None:
            last = closed[-1]
            if not self._is_planned:
                self._choices.reason = last.reason
            if self._reasons.is_news(last.reason, now):
                self._on_event(f"round {last.key.run}: {last.reason}")

    def take_plan(self, worker: int, message: pb.CutoffPlan, now: float) -> tuple[Closed, ...]:
        """Takes a plan of the first shard's that a worker has handed on."""
        most = self._rounds.num_workers
        if self._is_first or not self._is_planned or not 1 <= message.count <= most:
            raise invalid(
                f"Expected plans of 1 to {most} contributions, for another shard than the first, "
                f"in a job whose cutoff is planned. Received: count={message.count} from worker "
                f"{worker}."
            )
        if message.run > self._rounds.runs_over + _RUNS_AHEAD:
            raise invalid(
                f"Expected a plan for a run up to {self._rounds.runs_over + _RUNS_AHEAD}. "
                f"Received: run={message.run} from worker {worker}."
            )
        plan = Plan(message.count, None, message.reason[:_MOST_WORDS])
        return self._rounds.set_plan(message.run, plan, now)

    def catch_up(self, worker: int) -> None:
        """Tells a worker that comes late what the others have been told."""
        planned = self._rounds.plan
        if self._tells_plans and planned is not None:
            self._streams.tell(worker, _message(*planned))

    def report(self) -> pb.CutoffReport | None:
        """Returns what the policy has chosen lately, if it chooses."""
        if self._reasons is None:
            return None
        report = pb.CutoffReport(
            policy=str(self._policy),
            reason=self._choices.reason,
            failure=self._rounds.cutoff.failure,
        )
        recent = self._choices.recent()
        if recent:
            counts = [choice.count for choice in recent]
            report.rounds = len(recent)
            report.mean_count = float(np.mean(counts))
            report.least, report.most = min(counts), max(counts)
            expected = [c for c in recent if not math.isnan(c.expected_seconds)]
            compared = expected or recent
            report.closed_seconds = float(np.median([c.closed_seconds for c in compared]))
            if expected:
                report.expected_seconds = float(np.median([c.expected_seconds for c in expected]))
        return report

    def close(self) -> None:
        """Ends the planning. May be called twice; not with the job's lock held."""
        if self.planning is not None:
            self.planning.close()

    def _tell_failure(self) -> None:
        text = f"full sync from now on, because the cutoff policy {self._rounds.cutoff.failure}"
        if not self._failure_logged:
            self._failure_logged = True
            self._on_event(text)
        if 0 in self._streams:
            self._failure_told = True
            self._streams.tell(0, pb.ToWorker(notice=pb.Notice(text=text)))

    def _tell_plan(self) -> None:
        planned = self._rounds.plan
        if planned is not None:
            self._told = self._rounds.rounds
            self._streams.tell_all(_message(*planned))


def _message(run: int, plan: Plan) -> pb.ToWorker:
    reason = plan.reason[:_MOST_WORDS]
    return pb.ToWorker(cutoff_plan=pb.CutoffPlan(run=run, count=plan.count, reason=reason))
