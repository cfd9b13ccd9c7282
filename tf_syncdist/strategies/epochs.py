"""Epoch exchanges: one message per worker carries everything that is combined once per epoch.

Metrics are summed over workers. Float state that training runs write outside of an optimizer, such
as the statistics of batch normalisation, is averaged, weighted by the runs that a worker computed.
Fingerprints of what workers must hold alike find a worker that does not.
"""

import collections
from collections.abc import Callable
from typing import Protocol

import numpy as np
import tensorflow as tf

from tf_syncdist.propagation.slices import layout_of
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.strategies import adapter, variables
from tf_syncdist.transport.session import Gathered, Session

_NO_EPOCH = -1


class Fingerprinted(Protocol):
    """What workers must hold alike."""

    def fingerprints(self, leave_out: set[int]) -> list[tuple[str, int]]:
        """Returns 64 bits for every common variable but those with these identities."""
        ...


class EpochExchange:
    """Keeps what was exchanged, and exchanges when a metric is read and there were runs since.

    Args:
        session: The connection to the service.
        state: The common variables.
        runs: Returns how many runs this worker has done, and how many of them it computed.
        mend: Called with another worker and the names of variables in which this one differs.
        is_ahead: Returns whether this worker's variables are those of a later run than its own,
            because it has taken over another's and is skipping runs.
        settle: Makes the update of the last run, if that waits for the next one.
    """

    def __init__(
        self,
        session: Session,
        state: Fingerprinted,
        runs: Callable[[], tuple[int, int]],
        mend: Callable[[int, list[str]], None],
        is_ahead: Callable[[], bool],
        settle: Callable[[], None],
    ) -> None:
        self._session = session
        self._state = state
        self._runs = runs
        self._mend = mend
        self._is_ahead = is_ahead
        self._settle = settle
        self._metrics: dict[int, tf.Variable] = {}
        self._statistics: dict[int, tf.Variable] = {}
        self._done = 0
        self._computed = 0
        # For every metric variable: the sum over workers, and what this worker held then.
        self._sums: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}

    def add(
        self, used: list[tf.Variable], written: list[tf.Variable], owned: list[tf.Variable]
    ) -> None:
        """Takes note of the variables of a training run.

        Args:
            used: Distributed variables that it reads or writes.
            written: Those that it writes.
            owned: Variables of optimizers.
        """
        owned_ids = {id(v) for v in owned}
        for variable in used:
            if adapter.is_sync_on_read(variable):
                self._metrics.setdefault(id(variable), variable)
        for variable in written:
            if (
                not adapter.is_sync_on_read(variable)
                and variable.dtype.is_floating
                and not variable.trainable
                and id(variable) not in owned_ids
                and not variables.is_loss_scale(variable)
            ):
                self._statistics.setdefault(id(variable), variable)

    def synchronize(self) -> None:
        """Exchanges now, if there were runs since the last time."""
        self._settle()
        done, computed = self._runs()
        if done > self._done:
            weight, self._done, self._computed = computed - self._computed, done, computed
            self._exchange(weight)

    def begin_fit(self, fit: int) -> None:
        """Compares with worker 0, where a fit begins that trains what was trained before."""
        self._settle()
        mine = self._state.fingerprints(set(self._statistics))
        if mine:
            found = self._session.gather(
                pb.START, 2 * fit + 1, self._runs()[0], hashes=_named(mine)
            )
            self._compare(mine, found)

    def epoch_of_chief(self, fit: int, epoch: int | None) -> int | None:
        """Returns the epoch with which worker 0 begins a fit, before `begin_fit`.

        Args:
            fit: Which fit; all workers have to ask.
            epoch: The epoch, if this is worker 0; `None` if it cannot begin.

        Returns:
            What worker 0 has said, or 0 if it has left the job.
        """
        is_chief = self._session.config.worker == 0
        mine = (_NO_EPOCH if epoch is None else epoch) if is_chief else 0
        found = self._session.gather(
            pb.START, 2 * fit, self._runs()[0], values=np.array([mine], np.float64)
        )
        return None if found.values[0] == _NO_EPOCH else int(found.values[0])

    def forget_sums(self) -> None:
        """A training run or an evaluation begins: metrics are this worker's own again."""
        self._sums.clear()

    def read(self, variable: tf.Variable, may_exchange: bool) -> tf.Tensor | None:
        """Returns a metric variable's value over all workers.

        Args:
            variable: A variable that is synchronised on read.
            may_exchange: Whether an exchange may happen now; it may not during an evaluation.

        Returns:
            The value, or `None` if this worker's own value is to be used.
        """
        if id(variable) not in self._metrics:
            return None
        if may_exchange:
            self.synchronize()
        found = self._sums.get(id(variable))
        if found is None:
            return None
        total, held = found
        # A variable that was reset or updated since is this worker's own again.
        if any(not np.array_equal(a, b) for a, b in zip(held, _values(variable), strict=True)):
            return None
        return tf.constant(total, variable.dtype)

    def _exchange(self, weight: int) -> None:
        metrics, statistics = list(self._metrics.values()), list(self._statistics.values())
        held = [_values(v) for v in metrics]
        own = [np.mean(_values(v), axis=0) for v in statistics]
        mine = _pack(
            # How many copies are summed, for metric variables that are averaged.
            [np.float64(len(held[0]) if held else 1), np.float64(weight)],
            [np.sum(h, axis=0, dtype=np.float64) for h in held],
            # 0 times infinity is no number, but a worker without runs has none to say.
            [
                np.multiply(s, weight, dtype=np.float64) if weight else np.zeros(s.shape)
                for s in own
            ],
        )
        names = [(v.name, v.shape.as_list(), v.aggregation.name) for v in (*metrics, *statistics)]
        prints = self._state.fingerprints(set(self._statistics))
        found = self._session.gather(
            pb.METRICS,
            self._done,
            self._done,
            layout_of(names),
            mine,
            _named(prints),
            empty=not weight,
        )
        self._compare(prints, found)
        (copies, weights), sums, means = _unpack(
            found.values, [(), ()], [h[0].shape for h in held], [s.shape for s in own]
        )
        for variable, value, copy in zip(metrics, sums, held, strict=True):
            if variable.aggregation is tf.VariableAggregation.MEAN:
                value = value / copies
            self._sums[id(variable)] = (value.astype(copy[0].dtype), copy)
        if weights and not self._is_ahead():
            averages = [(m / weights).astype(s.dtype) for m, s in zip(means, own, strict=True)]
            variables.assign(statistics, averages)

    def _compare(self, mine: list[tuple[str, int]], found: Gathered) -> None:
        """Mends this worker if it differs from the one whose fingerprints have come."""
        if self._is_ahead():
            return
        own = _named(mine)
        others = dict(zip(found.hashes[::2], found.hashes[1::2], strict=True))
        # A worker that has come later may know fewer variables, or in another order.
        differing = [
            name
            for (name, value), key in zip(mine, own[::2], strict=True)
            if others.get(key, value) != value
        ]
        if differing and found.reference != self._session.config.worker:
            self._mend(found.reference, differing)


def _named(prints: list[tuple[str, int]]) -> list[int]:
    """Returns a hash of the name and that of the value, for each variable in turn."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for name, value in prints:
        found += [layout_of([name, seen[name]]), value]
        seen[name] += 1
    return found


def _pack(*groups: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(a) for group in groups for a in group])


def _unpack(vector: np.ndarray, *groups: list[tuple[int, ...]]) -> list[list[np.ndarray]]:
    found, start = [], 0
    for shapes in groups:
        found.append([])
        for shape in shapes:
            size = int(np.prod(shape))
            found[-1].append(vector[start : start + size].reshape(shape))
            start += size
    return found


def _values(variable: tf.Variable) -> list[np.ndarray]:
    return [c.numpy() for c in adapter.components(variable)]
