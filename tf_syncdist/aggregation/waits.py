"""Says for whom the job waits, when that takes long. Pure."""

from tf_syncdist.aggregation.membership import Members
from tf_syncdist.aggregation.relays import StateRelay
from tf_syncdist.aggregation.rounds import Rounds

_NOTICE_SECONDS = 10.0


class Waits:
    """Remembers since when something has been waited for."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def due(self, rounds: Rounds, relay: StateRelay, members: Members, now: float) -> list[str]:
        """Returns the lines that are to be said now: one every ten seconds for each wait."""
        waits: dict[str, tuple[str, list[int]]] = {}
        run = rounds.runs_over
        missing = sorted({*rounds.missing(run), *rounds.lacking()})
        count = rounds.arrived(run)
        if missing and count:
            needed = rounds.replicas_to_aggregate
            waits[f"round {run}"] = (f"round {run}: {count} of {needed} contributions", missing)
        for start, absent in relay.waiting_for().items():
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
