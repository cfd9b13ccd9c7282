"""What a service that was started again learns from the workers before it goes on. Pure.

No result that any worker has received may be computed again (rule 28 of docs/semantics.md). So each
worker says what it has, and is asked for what others miss.
"""

import itertools
from collections.abc import Collection
from typing import NamedTuple

from tf_syncdist.aggregation.records import Fate, SliceKey, SliceSpec
from tf_syncdist.proto import tf_syncdist_pb2 as pb

# How long the workers that were there before may take to come back, after the last one that has. A
# round is closed without those that take longer.
GRACE_SECONDS = 4.0
# How long they may take to give what they were asked for.
_GIVE_SECONDS = 20.0


class Want(NamedTuple):
    """A worker is to be asked for a result."""

    holder: int
    key: SliceKey


class Restored(NamedTuple):
    """What the service goes on with; see `Rounds.restore`.

    Args:
        positions: The run that each worker is in.
        counts: What each worker has counted.
        exchanges: For the newest runs that are over, how many exchanges they had.
        results: The results that workers have given, by what they are.
    """

    positions: dict[int, int]
    counts: dict[int, dict[Fate, int]]
    exchanges: dict[int, int]
    results: dict[SliceKey, pb.Result]


class Recovery:
    """Collects what the workers of a job know.

    Args:
        now: When the first of them came, in seconds.
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._standings: dict[int, pb.Standing] = {}
        self._others: set[int] = set()
        self._gone: set[int] = set()
        self._asked: dict[SliceKey, int] = {}
        self._refused: set[tuple[int, SliceKey]] = set()
        self._asked_since: float | None = None
        self._results: dict[SliceKey, pb.Result] = {}

    @property
    def standings(self) -> dict[int, pb.Standing]:
        """What each worker has said."""
        return self._standings

    def add(self, worker: int, standing: pb.Standing, now: float) -> None:
        """Takes note of what a worker knows that has come now."""
        self._since = now
        self._standings[worker] = standing
        self._gone.discard(worker)

    def add_new(self, worker: int) -> None:
        """Takes note of a new process, which knows nothing, perhaps in place of one that did."""
        self.drop(worker)
        self._gone.discard(worker)
        self._others.add(worker)

    def drop(self, worker: int) -> None:
        """Takes note that a worker is gone, and with it what only it had."""
        self._standings.pop(worker, None)
        self._others.discard(worker)
        self._gone.add(worker)
        self._asked = {k: w for k, w in self._asked.items() if w != worker}

    def missing(self) -> set[int]:
        """Returns the workers that were there before and have not come back."""
        before = {w for s in self._standings.values() for w in s.members}
        return before - set(self._standings) - self._others - self._gone

    def wants(self, now: float) -> list[Want]:
        """Returns whom to ask for what, everything once; nothing while workers may still come."""
        if self._asked_since is None:
            if self.missing() and now - self._since < GRACE_SECONDS:
                return []
            self._asked_since = now
        if now - self._asked_since > _GIVE_SECONDS:
            # Who has not given anything by now does not count as somebody who has it.
            self._refused |= {(w, k) for k, w in self._asked.items() if k not in self._results}
            self._asked = {k: w for k, w in self._asked.items() if k in self._results}
            self._asked_since = now
        wanted = []
        turns = itertools.cycle(sorted(self._standings))
        for key, holders in sorted(self._needed().items()):
            if key in self._asked or key in self._results:
                continue
            holder = next(w for w in turns if w in holders)
            self._asked[key] = holder
            wanted.append(Want(holder, key))
        return wanted

    def stored(self, worker: int, result: pb.Result) -> bool:
        """Takes a result from a worker that was asked for it; returns whether it was."""
        key = SliceKey(result.run, result.exchange, result.slice)
        if self._asked.get(key) != worker or key in self._results:
            return False
        self._results[key] = result
        return True

    def is_complete(self, now: float) -> bool:
        """Returns whether nothing is left to wait for."""
        if self._asked_since is None or self.wants(now):
            return False
        return all(key in self._results for key in self._asked)

    def restored(self) -> Restored:
        """Returns what the service goes on with."""
        over = self._over()
        exchanges: dict[int, int] = {}
        for run, count in sorted(self._kept().items(), reverse=True):
            if not self._results.keys() >= self._keys_of(run):
                break
            exchanges[run] = count
        results = {k: r for k, r in self._results.items() if k.run == over or k.run in exchanges}
        return Restored(
            {w: s.run for w, s in self._standings.items()},
            {
                w: {
                    Fate.CONTRIBUTED: s.contributed,
                    Fate.LATE: s.late,
                    Fate.REPLAYED: s.replayed,
                    Fate.MISSED: s.missed,
                }
                for w, s in self._standings.items()
            },
            dict(sorted(exchanges.items())),
            results,
        )

    # How.

    def _over(self) -> int:
        return max(s.run for s in self._standings.values())

    def _kept(self) -> dict[int, int]:
        """Returns the newest runs that are over, as far as some worker has all of their results."""
        done = {
            held.run: held.exchanges
            for standing in self._standings.values()
            for held in standing.held
            if held.done
        }
        first = over = self._over()
        while first - 1 in done and self._is_needed(first - 1):
            first -= 1
        return {run: done[run] for run in range(first, over)}

    def _keys_of(self, run: int) -> set[SliceKey]:
        """Returns all results of a run that is over."""
        return {
            SliceKey(run, part.exchange, part.slice)
            for standing in self._standings.values()
            for held in standing.held
            if held.run == run and held.done
            for part in held.slices
        }

    def _is_needed(self, run: int) -> bool:
        return any(s.run <= run for s in self._standings.values())

    def _needed(self) -> dict[SliceKey, Collection[int]]:
        """Returns the results that are to be had, and who has them."""
        over, kept = self._over(), self._kept()
        holders: dict[SliceKey, set[int]] = {}
        for worker, standing in self._standings.items():
            for held in standing.held:
                # Of a run that is over a worker that has done it has everything, and only those
                # count: another one may have got a result of a run that was cut short.
                if (held.run == over) or (held.done and held.run in kept):
                    for part in held.slices:
                        key = SliceKey(held.run, part.exchange, part.slice)
                        if (worker, key) not in self._refused:
                            holders.setdefault(key, set()).add(worker)
        return holders


def spec_of(result: pb.Result) -> SliceSpec:
    """Returns what workers must agree on about a slice of which there is a result."""
    dtype = pb.DataType.Name(result.dtype).lower()
    return SliceSpec(result.num_slices, dtype, result.elements, result.layout)
