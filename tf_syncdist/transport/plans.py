"""Hands plans of the first shard on to the other ones."""

from collections.abc import Callable

from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.link import Link
from tf_syncdist.transport.session_config import SessionConfig


class PlanRelay(Link):
    """The part of a session that is about with how many contributions a round closes.

    Shards do not know one another, so each worker tells them; the first one to do so counts.
    """

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        self._cutoff_plan: pb.CutoffPlan | None = None

    def _on_cutoff_plan(self, shard: int, message: pb.CutoffPlan, *_: object) -> bool:
        self._cutoff_plan = message
        for other in range(1, len(self._connections)):
            self._send(other, pb.ToAggregator(cutoff_plan=message))
        return False

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        super()._resend(shard, welcome, is_new)
        if shard and self._cutoff_plan is not None:
            self._send(shard, pb.ToAggregator(cutoff_plan=self._cutoff_plan))
