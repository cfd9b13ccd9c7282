"""Which workers are there: their lives, when each was heard of last, and who is silent. Pure."""

import collections
import statistics
from typing import NamedTuple

# A worker is not taken for silent before it was silent for as long as this ...
_LEAST_SECONDS = 1.0
# ... and never waited for longer than for so many rounds.
_ROUNDS = 300.0
_RECENT_ROUNDS = 20
# Where so much time passes between two looks at the clock, this process itself had no turn.
_ASLEEP_SECONDS = 0.5

# How long a worker whose connection broke may take to come back to where it was.
AWAY_SECONDS = 30.0

# A life that was followed by another is refused. So many are remembered for each worker.
_MOST_RETIRED = 1000


class NotAdmitted(Exception):
    """A process is not let in; the text says why. `is_final` tells whether to ask again later."""

    def __init__(self, text: str, is_final: bool) -> None:
        super().__init__(text)
        self.is_final = is_final


class Changes(NamedTuple):
    """What the passing of time has changed.

    Args:
        silent: Workers of which nothing was heard for too long.
        heard: Workers of which something was heard again.
        given_up: Workers that have been away for too long to come back to where they were.
    """

    silent: tuple[int, ...]
    heard: tuple[int, ...]
    given_up: tuple[int, ...]


class Members:
    """Keeps account of the workers of a job.

    Args:
        num_workers: How many workers the job has.
        detection_seconds: A worker is silent when nothing was heard of it for so long, or for 300
            rounds, but at least for one second.
    """

    def __init__(self, num_workers: int, detection_seconds: float) -> None:
        self._detection_seconds = detection_seconds
        self._lives: dict[int, int] = {}
        self._retired: dict[int, collections.deque[int]] = {
            w: collections.deque(maxlen=_MOST_RETIRED) for w in range(num_workers)
        }
        self._addresses: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._patience: dict[int, float] = {}
        self._looked_at: float | None = None
        self._here: set[int] = set()
        self._silent: set[int] = set()
        self._away: dict[int, float] = {}
        self._rounds: collections.deque[float] = collections.deque(maxlen=_RECENT_ROUNDS)

    # What is known.

    @property
    def here(self) -> frozenset[int]:
        """The workers that are connected and not silent."""
        return frozenset(self._here - self._silent)

    @property
    def away(self) -> frozenset[int]:
        """The workers that may come back to where they were."""
        return frozenset(self._away)

    @property
    def have_come(self) -> frozenset[int]:
        """The workers that have been there at least once."""
        return frozenset(self._lives)

    def is_life(self, worker: int, incarnation: int) -> bool:
        """Returns whether this is the worker's present life."""
        return self._lives.get(worker) == incarnation

    def describe(self, worker: int, now: float) -> str:
        """Returns a worker's address and when it was heard of last, for a human."""
        address = self._addresses.get(worker)
        if worker not in self._heard:
            return f"worker {worker} (never seen)"
        seen = f"last seen {max(0.0, now - self._heard[worker]):.0f} s ago"
        return f"worker {worker} ({f'{address}, ' if address else ''}{seen})"

    def patience_seconds(self) -> float:
        """Returns after how long without a sign a worker is taken for silent."""
        patience = self._detection_seconds
        if len(self._rounds) > 3:
            times = list(self._rounds)
            typical = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
            patience = min(patience, _ROUNDS * typical)
        return max(patience, min(_LEAST_SECONDS, self._detection_seconds))

    # What happens.

    def admit(self, worker: int, incarnation: int, address: str, now: float) -> bool:
        """Lets a process in.

        Args:
            worker: Which worker it is.
            incarnation: Its life.
            address: By which people know it.
            now: Time, in seconds.

        Returns:
            Whether it is the life that was there before.

        Raises:
            NotAdmitted: If the life was followed by another, or another one is there.
        """
        if incarnation in self._retired[worker]:
            raise NotAdmitted(
                f"Expected the newest process of worker {worker}. Received: one that was followed "
                "by another, which takes its place in the job. End this process.",
                True,
            )
        before = self._lives.get(worker)
        if before is not None and before != incarnation:
            if worker in self._here and worker not in self._silent:
                raise NotAdmitted(
                    "Expected every worker of a job to connect once. Received: worker="
                    f"{worker}, which is connected. Start one process per task, and a new service "
                    "per job.",
                    False,
                )
            self._retired[worker].append(before)
        self._lives[worker] = incarnation
        self._addresses[worker] = address
        self._heard[worker] = now
        self._here.add(worker)
        self._silent.discard(worker)
        self._away.pop(worker, None)
        return before == incarnation

    def hear(self, worker: int, now: float) -> None:
        """Takes note of a sign of life."""
        self._heard[worker] = now

    def beat(self, worker: int, now: float) -> float:
        """Takes note of a heartbeat and returns in how many seconds the next one is due."""
        self.hear(worker, now)
        # Where rounds become faster, this worker does not know of it before its next heartbeat.
        self._patience[worker] = self.patience_seconds()
        return self._patience[worker] / 4

    def round_ended(self, now: float) -> None:
        """Takes note that a round is over."""
        self._rounds.append(now)

    def lose(self, worker: int, now: float, for_good: bool) -> None:
        """Takes note that a worker's connection is gone.

        Args:
            worker: The worker.
            now: Time, in seconds.
            for_good: Whether it has said goodbye before.
        """
        self._here.discard(worker)
        self._silent.discard(worker)
        if not for_good:
            self._away[worker] = now

    def tick(self, now: float) -> Changes:
        """Returns what has changed by the passing of time. To be called every 0.2 s or so."""
        self._forgive(now)
        patience = self.patience_seconds()
        quiet = {
            w
            for w in self._here
            if now - self._heard[w] > max(patience, self._patience.get(w, 0.0))
        }
        silent, heard = quiet - self._silent, self._silent - quiet
        given_up = {w for w, since in self._away.items() if now - since > AWAY_SECONDS}
        self._silent = quiet
        for worker in given_up:
            del self._away[worker]
        return Changes(tuple(sorted(silent)), tuple(sorted(heard)), tuple(sorted(given_up)))

    def _forgive(self, now: float) -> None:
        """Leaves out the time in which this process had no turn, and so could not hear anybody."""
        asleep = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        if asleep > _ASLEEP_SECONDS:
            for worker in self._here - self._silent:
                self._heard[worker] = min(self._heard[worker] + asleep, now)
