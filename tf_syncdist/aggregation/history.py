"""Where workers are, and which runs are kept for those that are behind. Pure."""

from collections.abc import Callable, Collection

# Also of rounds without many bytes no more are kept, for a worker that is that far behind.
_MOST_RUNS_KEPT = 100_000


class Positions(list[int]):
    """The run that each worker is in or about to begin.

    What is the lowest of them is asked with every run of every worker, so it is remembered.

    Args:
        num_workers: How many workers the job has.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__([0] * num_workers)
        self._lowest = 0
        # How many of those that count are there; 0 if that has to be looked up.
        self._at_lowest = 0

    def __setitem__(self, worker: int, run: int) -> None:
        self._at_lowest = 0
        super().__setitem__(worker, run)

    @property
    def is_known(self) -> bool:
        """Whether the lowest position is the same as when it was asked last."""
        return self._at_lowest > 0

    def advance(self, worker: int) -> None:
        """Takes note that a worker that counts has done its run."""
        run = self[worker]
        list.__setitem__(self, worker, run + 1)
        if run == self._lowest and self._at_lowest:
            self._at_lowest -= 1

    def forget(self) -> None:
        """Takes note that others count than before."""
        self._at_lowest = 0

    def lowest(self, workers: Callable[[], Collection[int]], default: int) -> int:
        """Returns the lowest position of some workers.

        Args:
            workers: Returns the workers that count.
            default: What to return if there are none.
        """
        if not self._at_lowest:
            positions = [self[w] for w in workers()]
            if not positions:
                return default
            self._lowest = min(positions)
            self._at_lowest = positions.count(self._lowest)
        return self._lowest


class History:
    """Which runs that are over are kept.

    Args:
        most_rounds: At least so many rounds are kept, as long as somebody needs them.
        most_bytes: And more, while they need at most so many bytes.

    Attributes:
        kept_from: The first run that is kept.
        exchanges: How many exchanges each run had that is over and kept.
        bytes: Size of all results, runs in progress included.
    """

    def __init__(self, most_rounds: int, most_bytes: int) -> None:
        self.kept_from = 0
        self.exchanges: dict[int, int] = {}
        self.bytes = 0
        self._most_rounds = most_rounds
        self._most_bytes = most_bytes
        self._rounds = 0

    @property
    def is_full(self) -> bool:
        """Whether runs that somebody needs may be too many."""
        return self.bytes > self._most_bytes or len(self.exchanges) > _MOST_RUNS_KEPT

    def add(self, run: int, exchanges: int) -> None:
        """Takes note that a run is over."""
        self.exchanges[run] = exchanges
        self._rounds += exchanges > 0

    def restore(self, over: int, exchanges: dict[int, int]) -> None:
        """Takes over the newest runs that are over, without a gap."""
        self.kept_from = over - len(exchanges)
        self.exchanges = dict(exchanges)
        self._rounds = sum(n > 0 for n in exchanges.values())

    def evict(self, over: int, needed_from: int, forget: Callable[[int], int]) -> tuple[int, ...]:
        """Forgets runs that nobody needs or that are too many, oldest first.

        Args:
            over: How many runs are over.
            needed_from: The first run that somebody needs.
            forget: Forgets a run and returns how many bytes its results had.
        """
        evicted = []
        while self.kept_from < over:
            run = self.kept_from
            if run >= needed_from:
                if not self.is_full or self._rounds <= self._most_rounds:
                    break
            self.bytes -= forget(run)
            self._rounds -= self.exchanges.pop(run) > 0
            self.kept_from = run + 1
            evicted.append(run)
        return tuple(evicted)
