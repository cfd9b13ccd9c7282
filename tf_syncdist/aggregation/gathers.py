"""Gathers: small exchanges outside of runs, one message per worker. Pure."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from tf_syncdist.aggregation.cutoffs import Alarms, Cutoff
from tf_syncdist.aggregation.records import RoundError
from tf_syncdist.cutoff import CutoffPolicy, Plan, SliceView

# The numbers are those of the contract.
START, PROPAGATION, LEARNERS = 2, 4, 5

# A worker waits for what comes of a gather before it takes part in another one.
_MOST_OPEN = 4
# Those that are closed are remembered until every worker has gone past them. A worker that comes
# later than that to one of them is alone in it.
_MOST_CLOSED = 1000
# Their results are kept for workers that have not connected yet; each takes a little besides.
_MOST_RESULT_BYTES = 256 * 2**20
_RESULT_BYTES = 256


class GatherKey(NamedTuple):
    """Names a gather: of which kind, and which one of that kind."""

    kind: int
    serial: int


# From these the job has chosen for good.
KEPT = (GatherKey(PROPAGATION, 0), GatherKey(LEARNERS, 0))


class Part(NamedTuple):
    """What a worker says in a gather, but for the values.

    Args:
        run: How many runs it has done.
        layout: Fingerprint of what the values are.
        elements: How many they are.
        hashes: Of the common variables, or none.
        stop: Whether the worker wishes that training stops.
        empty: Whether it has nothing to add.
    """

    run: int
    layout: int
    elements: int
    hashes: tuple[int, ...] = ()
    stop: bool = False
    empty: bool = False


# Stands for what the first worker said where only the result is known.
_RESTORED = Part(0, 0, 0)


class GatherClosed(NamedTuple):
    """A gather that has just been closed.

    Args:
        key: Which.
        run: The most runs that a contributor had done.
        contributors: Who is in it, in the order of their arrival.
        reference: The worker whose hashes follow: worker 0 if it is in it, else the lowest one.
        hashes: The reference's hashes.
        stop: Whether any contributor wishes that training stops.
    """

    key: GatherKey
    run: int
    contributors: tuple[int, ...]
    reference: int
    hashes: tuple[int, ...]
    stop: bool


class _Gather:
    def __init__(self, part: Part, now: float) -> None:
        self.first = part
        self.run = part.run
        self.opened_at = now
        self.contributors: list[int] = []
        # Whether any of them has something to add.
        self.filled = False
        self.hashes: tuple[int, ...] = ()
        self.stop = False
        self.closed = False
        self.wait_until: float | None = None

    def add(self, worker: int, part: Part) -> None:
        self.contributors.append(worker)
        self.filled = self.filled or not part.empty
        self.run = max(self.run, part.run)
        self.stop = self.stop or part.stop
        if worker == min(self.contributors):
            self.hashes = part.hashes


class Gathers:
    """Decides who is in a gather, by the cutoff of the rounds.

    Args:
        num_workers: How many workers the job has.
        policy: The cutoff policy.
        begun: Tells how many runs a worker has begun. A worker that has gone on past a gather
            without taking part will not come, so nobody waits for it.
        awaited: Returns the workers that take part; all of them by default.
        plan: Returns the last plan of a round, by which gathers are closed, too.
    """

    def __init__(
        self,
        num_workers: int,
        policy: CutoffPolicy | Cutoff,
        begun: Callable[[int], int],
        awaited: Callable[[], Collection[int]] | None = None,
        plan: Callable[[], Plan | None] = lambda: None,
    ) -> None:
        self._num_workers = num_workers
        self._policy = policy
        self._plan = plan
        self._alarms = Alarms()
        self._begun = begun
        self._awaited = awaited or (lambda: set(range(num_workers)))
        self._gathers: dict[GatherKey, _Gather] = {}
        # Workers that skip runs, and where their programs are.
        self._skipping: dict[int, int] = {}

    def contribute(self, worker: int, key: GatherKey, part: Part, now: float) -> bool:
        """Takes note of a worker's message and returns whether its values are to be added.

        Args:
            worker: Index of the worker.
            key: Which gather it takes part in.
            part: What it says.
            now: Time of arrival, in seconds.

        Raises:
            RoundError: If workers disagree on what is summed.
        """
        gather = self._gathers.get(key)
        if gather is None:
            self._check_open(worker, key)
            gather = self._gathers[key] = _Gather(part, now)
        first = gather.first
        if first is not _RESTORED and (first.layout, first.elements) != (
            part.layout,
            part.elements,
        ):
            raise RoundError(
                f"Expected the same metrics on every worker after run {part.run}: "
                f"{first.elements} value(s), layout {first.layout:016x}. Received: "
                f"{part.elements} value(s), layout {part.layout:016x}, from worker {worker}. "
                "Compile the same metrics on every worker."
            )
        if gather.closed or worker in gather.contributors:
            return False
        gather.add(worker, part)
        return True

    def close(self, now: float) -> list[GatherClosed]:
        """Closes what can be closed; ask after every message and after a worker left."""
        closed = []
        for key, gather in self._gathers.items():
            if gather.closed or not gather.contributors:
                continue
            to_come = {w for w in self._awaited() if self._begun(w) <= gather.run}
            to_come -= set(gather.contributors)
            if key.kind == START and 0 in to_come:
                continue
            if to_come and not gather.filled:
                # Else a straggler that has replayed all rounds would be alone in it: metrics of
                # nothing, and statistics that stay as unlike as they are.
                continue
            view = SliceView(
                now=now,
                opened_at=gather.opened_at,
                contributions=len(gather.contributors),
                possible=len(to_come) + len(gather.contributors),
                num_workers=self._num_workers,
                plan=self._plan(),
            )
            decision = self._policy.decide(view)
            self._alarms.set(gather, decision.wait_until)
            if decision.close:
                gather.closed = True
                contributors = tuple(gather.contributors)
                reference = min(contributors)
                closed.append(
                    GatherClosed(
                        key, gather.run, contributors, reference, gather.hashes, gather.stop
                    )
                )
        if len(self._gathers) > _MOST_CLOSED:
            self._forget_old()
        return closed

    @property
    def wake_at(self) -> float | None:
        """When to call `close` if nothing changes before, in seconds; `None` for never."""
        return self._alarms.earliest

    @property
    def waiting(self) -> bool:
        """Whether a gather is open."""
        return any(not gather.closed for gather in self._gathers.values())

    def restore(self, key: GatherKey, run: int) -> bool:
        """Takes note of a gather that is closed; returns whether that was not known."""
        if key in self._gathers and self._gathers[key].closed:
            return False
        gather = self._gathers[key] = _Gather(_RESTORED, 0.0)
        gather.run, gather.closed = run, True
        return True

    def skip(self, worker: int, run: int) -> None:
        """Takes note that a worker goes on from a later state than its program, which skips runs.

        It will ask for what was gathered in between; it must not be alone in that, since it might
        not stop a training that the others have stopped.

        Args:
            worker: The worker.
            run: How many runs its program has done.
        """
        self._skipping[worker] = min(run, self._skipping.get(worker, run))

    def arrive(self, worker: int) -> None:
        """Takes note that a worker's program does runs and does not skip them any more."""
        self._skipping.pop(worker, None)

    def drop(self, key: GatherKey) -> None:
        """Forgets a gather that is closed, because its result is not kept any more."""
        if key in self._gathers and self._gathers[key].closed:
            del self._gathers[key]

    def forget(self, present: Collection[int]) -> list[GatherKey]:
        """Forgets gathers that every present worker has gone past, and returns them."""
        done = min((self._skipping.get(w, self._begun(w)) for w in present), default=0)
        gone = [
            k
            for k, gather in self._gathers.items()
            if gather.closed and gather.run < done and k not in KEPT
        ]
        for key in gone:
            del self._gathers[key]
        return gone

    def _forget_old(self) -> None:
        closed = [k for k, g in self._gathers.items() if g.closed and k not in KEPT]
        for key in closed[:-_MOST_CLOSED]:
            del self._gathers[key]

    def _check_open(self, worker: int, key: GatherKey) -> None:
        mine = [k for k, g in self._gathers.items() if not g.closed and worker in g.contributors]
        if len(mine) >= _MOST_OPEN:
            raise RoundError(
                f"Expected a worker to wait for what comes of {_MOST_OPEN} gathers before it "
                f"takes part in another one. Received: serial={key.serial} from worker {worker}, "
                f"which is in {[k.serial for k in mine]}."
            )


class RecentResults(dict[GatherKey, bytes]):
    """The results of the last gathers, as messages; of old ones no more than there is room for."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0

    def __setitem__(self, key: GatherKey, message: bytes) -> None:
        self.pop(key, None)
        super().__setitem__(key, message)
        self._bytes += len(message) + _RESULT_BYTES
        while self._bytes > _MOST_RESULT_BYTES:
            oldest = next((k for k in self if k not in KEPT), None)
            if oldest is None:
                break
            self.pop(oldest)

    def pop(self, key: GatherKey, default: bytes | None = None) -> bytes | None:
        """Forgets a result."""
        if key in self:
            self._bytes -= len(self[key]) + _RESULT_BYTES
        return super().pop(key, default)
