"""Says for whom the job waits, when that takes long. Pure."""

from collections.abc import Mapping, Sequence

from tf_syncdist.aggregation.membership import Members
from tf_syncdist.aggregation.rounds import Rounds

_NOTICE_SECONDS = 10.0


class Waits:
    """Remembers since when something has been waited for."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def due(
        self,
        rounds: Rounds,
        starts: Mapping[int, Sequence[int]],
        members: Members,
        now: float,
    ) -> list[str]:
        """Returns the lines that are to be said now: one every ten seconds for each wait.

        Args:
            rounds: The rounds.
            starts: The workers that have sent no variables yet, for each run that waits for them.
            members: Who the workers are.
            now: Time, in seconds.
        """
        waits: dict[str, tuple[str, Sequence[int]]] = {}
        run = rounds.runs_over
        missing = sorted({*rounds.missing(run), *rounds.lacking()})
        count = rounds.arrived(run)
        if missing and count:
            planned = rounds.plan
            needed = planned[1].count if planned else rounds.replicas_to_aggregate
            waits[f"round {run}"] = (f"round {run}: {count} of {needed} contributions", missing)
        for start, absent in starts.items():
            what = f"the variables before run {start}"
            waits[what] = (what, absent)
        self._since = {what: self._since.get(what, now) for what in waits}
        self._said = {what: self._said.get(what, self._since[what]) for what in waits}
        lines = []
        for what, (text, workers) in waits.items():
            if now - self._said[what] >= _NOTICE_SECONDS:
                self._said[what] = now
                names = ", ".join(members.describe(w, now) for w in workers)
                waited = now - self._since[what]
                lines.append(f"{text} after {waited:.0f} s; waiting for {names}")
        return lines
