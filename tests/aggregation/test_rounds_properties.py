"""What holds for the rounds of a job whatever the speeds and the order of messages."""

import pickle
import random
from collections.abc import Iterator
from functools import partial

import pytest

from tf_syncdist.aggregation.rounds import Closed, Fate, Rounds, SliceKey, SliceSpec, Verdict
from tf_syncdist.cutoff import BackupWorkers


class Ledger:
    """One shard, which checks every answer; `closed` is what workers have been told."""

    def __init__(self, num_workers: int, b: int, slices: list[int], **history: int) -> None:
        self.rounds = Rounds(num_workers, BackupWorkers(b), **history)
        self.slices = slices
        self.present = set(range(num_workers))
        self.added: dict[SliceKey, list[int]] = {}
        self.closed: dict[SliceKey, tuple[int, ...]] = {}
        self.over: list[int] = []
        self._needed = num_workers - b

    def contribute(self, worker: int, key: SliceKey) -> None:
        spec = SliceSpec(self.slices[key.exchange], "float32", 10, key.exchange)
        was_closed = key in self.closed
        receipt = self.rounds.contribute(worker, key, spec, 0.0)
        assert receipt.verdict is (Verdict.LATE if was_closed else Verdict.ADD)
        if receipt.verdict is Verdict.ADD:
            self.added.setdefault(key, []).append(worker)
        assert all(c.key == key for c in receipt.closed)
        self._note(receipt.closed)

    def leave(self, worker: int) -> None:
        self.present.discard(worker)
        self._note(self.rounds.leave(worker, 0.0))

    def finish(self, worker: int, run: int, exchanges: int, fate: Fate) -> None:
        progress = self.rounds.finish(worker, run, exchanges, fate)
        for over in progress.over:
            assert over.run == len(self.over), "runs end in order"
            self.over.append(over.exchanges)

    def _note(self, closed: tuple[Closed, ...]) -> None:
        for key, contributors, _ in closed:
            assert key not in self.closed, "a slice closes once"
            possible = len(self.present | set(self.added[key]))
            assert list(contributors) == self.added[key]
            assert len(contributors) == min(self._needed, possible)
            assert len(set(contributors)) == len(contributors)
            self.closed[key] = contributors


def worker_steps(
    worker: int, program: list[int], shards: list[Ledger], rng: random.Random
) -> Iterator:
    """A worker that follows the protocol; yields whether it could go on.

    Messages to one shard stay in order, those to different shards are mixed. `program` tells how
    many exchanges each run has.
    """
    for run, exchanges in enumerate(program):
        yield True
        if all(run < len(shard.over) for shard in shards):
            yield from _shuffled(
                [[partial(s.finish, worker, run, exchanges, Fate.REPLAYED)] for s in shards], rng
            )
            continue
        used = total = 0
        late = False
        for exchange in range(exchanges):
            keys = [[SliceKey(run, exchange, i) for i in range(s.slices[exchange])] for s in shards]
            yield True  # It computes.
            if late or all(run < len(shard.over) for shard in shards):
                if not late:
                    yield from _shuffled(
                        [[partial(s.rounds.late, worker, run, 0.0)] for s in shards], rng
                    )
                late = True
            else:
                sends = [
                    [partial(s.contribute, worker, k) for k in rng.sample(ks, len(ks))]
                    for s, ks in zip(shards, keys, strict=True)
                ]
                yield from _shuffled(sends, rng)
            while not all(k in s.closed for s, ks in zip(shards, keys, strict=True) for k in ks):
                yield False
            for shard, of_shard in zip(shards, keys, strict=True):
                used += sum(worker in shard.closed[k] for k in of_shard)
                total += len(of_shard)
        fate = Fate.CONTRIBUTED if used == total and not late else Fate.LATE
        yield from _shuffled(
            [[partial(s.finish, worker, run, exchanges, fate)] for s in shards], rng
        )


def _shuffled(lanes: list[list], rng: random.Random) -> Iterator[bool]:
    lanes = [list(lane) for lane in lanes if lane]
    while lanes:
        lane = rng.choice(lanes)
        lane.pop(0)()
        if not lane:
            lanes.remove(lane)
        yield True


@pytest.mark.parametrize("seed", range(60))
def test_random_jobs_keep_the_accounts(seed: int) -> None:
    """Drop accounting (f7): N values per slice and never more, and a fate for every round."""
    rng = random.Random(seed)
    num_workers = rng.randint(1, 5)
    b = rng.randrange(num_workers)
    program = [rng.choice([0, 0, 1, 2, 3]) for _ in range(rng.randint(1, 12))]
    runs, rounds_done = len(program), sum(map(bool, program))
    # Some shards have no slice of an exchange.
    shards = [
        Ledger(num_workers, b, [rng.randint(number == 0, 3) for _ in range(3)])
        for number in range(rng.randint(1, 3))
    ]
    leaver = rng.randrange(num_workers) if num_workers > 1 and rng.random() < 0.3 else None
    workers = {w: worker_steps(w, program, shards, rng) for w in range(num_workers)}
    speeds = {w: 10.0 ** rng.uniform(-2, 0) for w in workers}
    blocked: set[int] = set()
    while workers:
        assert blocked < set(workers), f"workers {blocked} wait for one another"
        worker = rng.choices(list(workers), [speeds[w] for w in workers])[0]
        if worker == leaver and rng.random() < 0.02:
            del workers[worker]
            blocked.clear()
            for shard in rng.sample(shards, len(shards)):
                shard.leave(worker)
            continue
        try:
            blocked = set() if next(workers[worker]) else blocked | {worker}
        except StopIteration:
            del workers[worker]
    for shard in shards:
        rounds = shard.rounds
        assert (rounds.runs_over, rounds.rounds) == (runs, rounds_done)
        assert shard.over == program[: len(shard.over)]
        assert not any(program[len(shard.over) :]), "all runs with exchanges are over"
        slices = sum(sum(shard.slices[:exchanges]) for exchanges in program)
        assert len(shard.closed) == slices
        # Nobody got in after the end.
        assert {k: tuple(v) for k, v in shard.added.items()} == shard.closed
        accepted = sum(len(c) for c in shard.closed.values())
        if leaver is None or leaver in shard.present:
            assert accepted == (num_workers - b) * slices
        for worker in shard.present:
            fates = rounds.counts[worker].fates
            assert sum(fates.values()) == rounds_done
            assert fates[Fate.CONTRIBUTED] <= sum(
                all(worker in c for key, c in shard.closed.items() if key.run == run)
                for run, exchanges in enumerate(program)
                if exchanges
            )
            assert rounds.position(worker) == runs
            assert rounds.counts[worker].partly_used <= fates[Fate.LATE]
        if b == 0:
            in_time = [rounds.counts[w].fates[Fate.CONTRIBUTED] for w in shard.present]
            assert in_time == [rounds_done] * len(in_time)
        if len(shard.present) == num_workers:
            assert rounds.kept_from == runs and rounds.history_size == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_jobs_keep_the_history_within_its_limits_and_not_below(seed: int) -> None:
    rng = random.Random(seed)
    rounds_kept, bytes_kept = rng.randint(0, 4), rng.choice([0, 100, 400])
    shard = Ledger(3, 1, [1], history_rounds=rounds_kept, history_bytes=bytes_kept)
    rounds, run_bytes, runs = shard.rounds, 40, 20
    workers = {w: worker_steps(w, [1] * runs, [shard], rng) for w in range(3)}
    while workers:
        worker = rng.choices(list(workers), [1.0, 0.8, 0.05][: len(workers)])[0]
        if next(workers[worker], None) is None:
            del workers[worker]
        kept = rounds.runs_over - rounds.kept_from
        needed = rounds.runs_over - min(rounds.position(w) for w in range(3))
        # The run in progress counts too, so there may be one run less than there is room for.
        assert kept >= min(needed, max(rounds_kept, bytes_kept // run_bytes - 1))
        assert kept <= max(rounds_kept, bytes_kept // run_bytes)
    assert rounds.rounds == runs


class Tiny:
    """A job of 3 workers, N = 2 and two slices of which every state can be visited."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.shard = Ledger(3, 1, [2])
        self.doing: list[tuple] = [("begin",)] * 3
        self.may_leave = 2 if runs == 1 else 0

    def moves(self) -> Iterator[tuple]:
        """Yields what can happen next."""
        for worker, (state, *left) in enumerate(self.doing):
            run = self.shard.rounds.position(worker)
            if state == "send":
                yield from (("send", worker, index) for index in left)
                if run < len(self.shard.over):
                    yield "late", worker
            elif state == "wait":
                if all(SliceKey(run, 0, i) in self.shard.closed for i in range(2)):
                    yield "finish", worker
            elif state == "begin":
                yield "begin", worker
            if self.may_leave and state != "done":
                yield "leave", worker

    def move(self, what: str, worker: int, index: int = 0) -> None:
        shard, run = self.shard, self.shard.rounds.position(worker)
        if what == "begin" and run < len(shard.over):
            shard.finish(worker, run, 1, Fate.REPLAYED)
            self._next(worker)
        elif what == "begin":
            self.doing[worker] = ("send", 0, 1)
        elif what == "send":
            shard.contribute(worker, SliceKey(run, 0, index))
            left = [i for i in self.doing[worker][1:] if i != index]
            self.doing[worker] = ("send", *left) if left else ("wait",)
        elif what == "late":
            shard.rounds.late(worker, run, 0.0)
            self.doing[worker] = ("wait",)
        elif what == "finish":
            shard.finish(worker, run, 1, Fate.CONTRIBUTED)
            self._next(worker)
        else:
            shard.leave(worker)
            self.doing[worker] = ("done",)
            self.may_leave -= 1

    def _next(self, worker: int) -> None:
        done = self.shard.rounds.position(worker) == self.runs
        self.doing[worker] = ("done",) if done else ("begin",)

    @property
    def key(self) -> tuple:
        """What tells this state from others."""
        shard = self.shard
        added = tuple(sorted((k, tuple(sorted(v))) for k, v in shard.added.items()))
        counts = tuple(tuple(c.fates.values()) for c in shard.rounds.counts)
        positions = tuple(shard.rounds.position(w) for w in range(3))
        return tuple(self.doing), added, counts, positions, tuple(sorted(shard.present))


@pytest.mark.parametrize("runs, states, leavers", [(1, 700, True), (2, 5000, False)])
def test_every_order_of_messages_of_a_tiny_job(runs: int, states: int, leavers: bool) -> None:
    """No order blocks a worker for ever or breaks the accounts; slices close with any two."""
    seen: set[tuple] = set()
    ends: list[Tiny] = []
    stack = [Tiny(runs)]
    while stack:
        job = stack.pop()
        moves = list(job.moves())
        if not any(what != "leave" for what, *_ in moves):
            assert all(state == ("done",) for state in job.doing), "nobody is stuck"
            ends.append(job)
        snapshot = pickle.dumps(job)
        for move in moves:
            after = pickle.loads(snapshot)
            after.move(*move)
            if after.key not in seen:
                seen.add(after.key)
                stack.append(after)
    assert len(seen) > states
    pairs = set()
    for job in ends:
        rounds = job.shard.rounds
        assert rounds.rounds == runs and len(job.shard.closed) == 2 * runs
        for worker in job.shard.present:
            assert sum(rounds.counts[worker].fates.values()) == runs
        pairs |= {frozenset(c) for c in job.shard.closed.values()}
    assert {frozenset(p) for p in [(0, 1), (0, 2), (1, 2)]} <= pairs
    assert any(len(p) == 1 for p in pairs) == leavers
