"""Who gets whose variables: at the start, for new models, and workers that fell behind."""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from tf_syncdist.aggregation import manifests
from tf_syncdist.aggregation.records import RoundError

# A worker waits for the verdict on its variables, and for a state, before it goes on. A manifest
# takes much more memory than a request.
_MOST_STARTS = 4
_MOST_REQUESTS = 16
# What a piece takes besides its bytes.
_CHUNK_BYTES = 128


class Request(NamedTuple):
    """Who needs a state, and who was asked for it.

    Args:
        receiver: The worker that needs it.
        giver: The worker that was asked.
        level_will_do: Whether a worker that is no further than the receiver may give its own.
    """

    receiver: int
    giver: int
    level_will_do: bool


class _Start:
    def __init__(self) -> None:
        self.manifests: dict[int, list[manifests.Variable]] = {}
        self.chunks: list[bytes] = []
        self.bytes = 0
        self.agreed = False
        self.given = False
        self.failed = False


class States:
    """Relays variables between workers. Knows nothing of sockets: it returns what to send to whom.

    Args:
        num_workers: How many workers the job has.
        most_bytes: How many bytes of worker 0's variables are kept until all workers are there.
    """

    def __init__(self, num_workers: int, most_bytes: int = 2**62) -> None:
        self._num_workers = num_workers
        self._most_bytes = most_bytes
        self._starts: dict[int, _Start] = {}
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count(1)
        self._expected = set(range(num_workers))
        # What workers train already, and the workers that may have missed how it began.
        self._known: set[int] = set()
        self._returned: set[int] = set()

    def know(self, fingerprints: Iterable[int]) -> None:
        """Takes note of variables that workers hold in common."""
        self._known.update(fingerprints)

    def enter(self, worker: int) -> None:
        """Takes note of a worker that comes back, or comes while the job is in progress."""
        self._expected.add(worker)
        self._returned.add(worker)

    def knows(self, worker: int, run: int, variables: Sequence[manifests.Variable]) -> bool:
        """Returns whether a worker that came back is about to train what the others train."""
        known = bool(variables) and all(v.fingerprint in self._known for v in variables)
        start = self._starts.get(run)
        return known and worker in self._returned and (start is None or start.agreed)

    def manifest(
        self, worker: int, run: int, variables: list[manifests.Variable]
    ) -> tuple[str | None, list[bytes]]:
        """Takes note of what a worker is about to train.

        Args:
            worker: Index of the worker.
            run: The run before which the variables are synchronised.
            variables: The variables.

        Returns:
            The verdict for everybody (`None` while workers are missing, an empty string if all
            agree, else an error) and the chunks of worker 0 that are to be sent to the others.
        """
        if run not in self._starts:
            starts = self._starts.items()
            mine = [r for r, s in starts if not s.agreed and worker in s.manifests]
            _check_waiting(worker, mine, _MOST_STARTS)
        self._starts.setdefault(run, _Start()).manifests[worker] = variables
        return self._verdict(run)

    def waiting_for(self) -> dict[int, list[int]]:
        """Returns, for every run that waits for manifests, the workers that are missing."""
        return {
            run: sorted(self._expected - set(start.manifests))
            for run, start in self._starts.items()
            if not start.agreed
        }

    def start_chunk(self, worker: int, run: int, message: bytes, last: bool) -> bool:
        """Takes a piece of worker 0's variables; returns whether to send it on now."""
        if worker != 0:
            raise RoundError(
                "Expected the variables before a run from worker 0. "
                f"Received: worker={worker}, run={run}."
            )
        if run not in self._starts:
            given = [r for r, s in self._starts.items() if s.bytes]
            _check_waiting(worker, given, _MOST_STARTS)
        start = self._starts.setdefault(run, _Start())
        start.given = start.given or last
        if not start.agreed:
            start.chunks.append(message)
            start.bytes += len(message) + _CHUNK_BYTES
            kept = sum(s.bytes for s in self._starts.values())
            if kept > self._most_bytes:
                raise RoundError(
                    f"Expected at most {self._most_bytes} bytes of variables before all workers "
                    f"are there. Received: {kept} bytes, the last before run {run}."
                )
        return start.agreed

    def leave(self, worker: int, for_good: bool = True) -> list[tuple[int, str, list[bytes]]]:
        """Stops waiting for a worker; returns (run, verdict, chunks) where that decides.

        Nothing can start without worker 0, so it is waited for as long as it may come back.
        """
        if worker or for_good:
            self._expected.discard(worker)
        verdicts = []
        for run in list(self._starts):
            verdict, chunks = self._verdict(run)
            if verdict is not None:
                verdicts.append((run, verdict, chunks))
        return verdicts

    def _verdict(self, run: int) -> tuple[str | None, list[bytes]]:
        start = self._starts[run]
        if start.failed:
            return None, []
        if 0 not in self._expected and not start.given:
            start.failed = True
            return (
                "Expected worker 0 to give the variables that all workers start from. Received: "
                "worker 0 has left the job. Look at its log, and start the job again."
            ), []
        if start.agreed or not self._expected <= set(start.manifests) or 0 not in start.manifests:
            return None, []
        start.agreed = True
        chunks, start.chunks, start.bytes = start.chunks, [], 0
        error = manifests.first_difference(start.manifests)
        start.failed = bool(error)
        if not error:
            self.know(v.fingerprint for v in start.manifests[0])
        return error, chunks

    # Workers that fell too far behind.

    def request(
        self,
        receiver: int,
        givers: Collection[int],
        position: Callable[[int], int],
        wanted: int | None = None,
        level_will_do: bool = False,
    ) -> tuple[int, int] | None:
        """Chooses who gives its state to a worker.

        Args:
            receiver: The worker that needs a state.
            givers: Workers that can be asked.
            position: Tells the run that a worker is in.
            wanted: The worker that is to give it, unless it cannot be asked or is behind.
            level_will_do: Whether a worker that is no further than the receiver may give its own
                where nobody is further.

        Returns:
            The number of the request and the giver, or `None` if nobody can give a state.
        """
        mine = [i for i, r in self._requests.items() if r.receiver == receiver]
        _check_waiting(receiver, mine, _MOST_REQUESTS)
        at = position(receiver)
        able = [w for w in givers if w != receiver and position(w) >= at]
        further = [w for w in able if position(w) > at]
        if wanted in able:
            giver = wanted
        elif further or (able and level_will_do):
            giver = max(further or able, key=lambda w: (position(w), -w))
        else:
            return None
        request = next(self._ids)
        self._requests[request] = Request(receiver, giver, level_will_do)
        return request, giver

    def chunk(self, worker: int, request: int, last: bool) -> int | None:
        """Returns who receives a piece of a state, or `None` if the request was given up.

        Raises:
            RoundError: If the worker was not asked for it.
        """
        known = self._requests.get(request)
        if known is None:
            return None
        if known.giver != worker:
            raise RoundError(
                f"Expected the state for request {request} from worker {known.giver}, which was "
                f"asked. Received: worker={worker}."
            )
        if last:
            del self._requests[request]
        return known.receiver

    def drop(self, worker: int) -> list[Request]:
        """Forgets a worker whose stream is gone; returns requests that need another giver."""
        gone = [r for r in self._requests.values() if worker in (r.receiver, r.giver)]
        self._requests = {i: r for i, r in self._requests.items() if r not in gone}
        return [r for r in gone if r.receiver != worker]


def _check_waiting(worker: int, waiting: list[int], most: int) -> None:
    if len(waiting) >= most:
        raise RoundError(
            f"Expected a worker to wait for at most {most} answers about variables at a time. "
            f"Received: one question more from worker {worker}, which waits for those to "
            f"{waiting}."
        )
