"""The end of a round from which every worker keeps its values back."""

from collections.abc import Collection

from tf_syncdist.aggregation.outbox import Streams
from tf_syncdist.aggregation.rounds import Rounds
from tf_syncdist.proto import tf_syncdist_pb2 as pb


class Withheld:
    """Asks one worker for zeros where nobody else can contribute to the open round.

    A slice exists as soon as somebody contributes to it, so without this such a round would have
    no result, and those who wait for it would wait until their deadline.

    Args:
        rounds: The rounds.
        streams: The connected workers.
        is_first: Whether this is the first shard, which decides for all.
    """

    def __init__(self, rounds: Rounds, streams: Streams, is_first: bool) -> None:
        self._rounds = rounds
        self._streams = streams
        self._is_first = is_first
        self._asked: tuple[int, int] | None = None

    def ask(self, present: Collection[int]) -> None:
        """Asks the lowest of the workers that have begun the open round, if that is needed.

        Args:
            present: The workers that take part.
        """
        if not self._is_first:
            return
        run = self._rounds.runs_over
        if self._rounds.to_come(run):
            # Who has been asked may keep values back again in another exchange of the run.
            self._asked = None
            return
        worker = min((w for w in present if self._rounds.begun(w) > run), default=None)
        if worker is None or worker not in self._streams or self._asked == (run, worker):
            return
        self._asked = (run, worker)
        self._streams.tell(worker, pb.ToWorker(all_withheld=pb.AllWithheld(run=run)))
