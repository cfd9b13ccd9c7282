"""Which workers a round can count on. Pure."""


class Presence:
    """Who takes part in rounds, and who does so only later.

    Args:
        num_workers: How many workers the job has; all of them are expected at first.

    Attributes:
        present: The workers that have not left, and are not away.
        away: Workers that may come back to where they were.
        version: Grows whenever something changes.
    """

    def __init__(self, num_workers: int) -> None:
        self.present = set(range(num_workers))
        self.away: set[int] = set()
        self.version = 0
        self._awaited: frozenset[int] | None = None
        # Of the present ones, those that wait for another's state, or have none of their own yet
        # and will ask for one, and those of which nothing is heard.
        self._suspended: set[int] = set()
        self._stateless: set[int] = set()
        self._asking: set[int] = set()
        self._silent: set[int] = set()

    @property
    def awaited(self) -> frozenset[int]:
        """The workers that are there and take part."""
        if self._awaited is None:
            self._awaited = frozenset(self.present - self._suspended - self._silent)
        return self._awaited

    @property
    def there(self) -> set[int]:
        """The workers that count for `min_workers`.

        Who keeps its values back is there, and so is who waits for a state: it can have one only
        when the round is over.
        """
        return self.awaited | (self._asking & self.present - self._silent)

    def holds_state(self, worker: int) -> bool:
        """Returns whether a worker's variables are those of the run that it is in.

        Those of one that waits for another's are not, and it gives nothing while it waits.
        """
        return worker not in self._stateless and worker not in self._asking

    def enter(self, worker: int, is_new: bool) -> None:
        """Takes note that a worker is there again, perhaps as a process without any state."""
        if is_new:
            self._suspended.add(worker)
            self._stateless.add(worker)
        self.present.add(worker)
        self.away.discard(worker)
        # It asks again for what it still waits for.
        self._asking.discard(worker)
        self._change()

    def leave(self, worker: int, for_good: bool) -> None:
        """Takes note that a worker is not there any more."""
        self.present.discard(worker)
        self._silent.discard(worker)
        (self.away.discard if for_good else self.away.add)(worker)
        self._change()

    def suspend(self, worker: int) -> None:
        """Takes note that a worker waits for another's state."""
        self._suspended.add(worker)
        self._asking.add(worker)
        self._change()

    def resume(self, worker: int) -> None:
        """Takes note that a worker has another's state, and catches up with the others."""
        self._stateless.discard(worker)
        self._asking.discard(worker)
        self._change()

    def take_part(self, worker: int) -> None:
        """Takes note that a worker was heard of in a round.

        Of one that waits for a state this says nothing: it had sent that before it asked. Whoever
        waited for it could not give the state that it waits for.
        """
        if worker in self._asking:
            return
        if worker in self._suspended or worker in self._stateless:
            self._suspended.discard(worker)
            self.resume(worker)

    def silence(self, worker: int) -> None:
        """Takes note that nothing is heard of a worker."""
        self._silent.add(worker)
        self._change()

    def hear(self, worker: int) -> None:
        """Takes note that a worker is heard of again."""
        self._silent.discard(worker)
        self._change()

    def _change(self) -> None:
        self.version += 1
        self._awaited = None
