"""Gathers: small exchanges outside of runs, to which a worker adds and of which all get the sum."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import ServiceError
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.exchanges import Exchanging
from tf_syncdist.transport.session_config import SessionConfig

_NOTHING = np.empty(0)


class Gathered(NamedTuple):
    """What was gathered; the same on every worker.

    Args:
        values: The sum of the contributors' values.
        contributors: The workers that are in it, in the order of their arrival.
        reference: The worker whose hashes follow: worker 0 if it is in it, else the lowest one.
        hashes: The reference's hashes: of a name and a value in turn.
        stop: Whether any contributor wished that training stops.
    """

    values: np.ndarray
    contributors: tuple[int, ...]
    reference: int
    hashes: tuple[int, ...]
    stop: bool


class Gathering(Exchanging):
    """The part of a session that is about gathers."""

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        self._gathered: dict[tuple[int, int], tuple[pb.GatherResult, memoryview]] = {}
        self._awaited: tuple[int, int] | None = None
        self._asked: tuple[pb.ToAggregator, memoryview] | None = None
        # For a service that is started again: what was gathered last, of each kind.
        self._last: dict[int, tuple[pb.GatherResult, memoryview]] = {}

    def gather(
        self,
        kind: int,
        serial: int,
        run: int,
        layout: int = 0,
        values: np.ndarray = _NOTHING,
        hashes: Sequence[int] = (),
        stop: bool = False,
        empty: bool = False,
    ) -> Gathered:
        """Takes part in a gather and waits for what comes of it.

        Args:
            kind: What is gathered: `METRICS`, `START` or `STOP` of the contract.
            serial: Which one of that kind, counted alike by every worker.
            run: How many runs this worker has done.
            layout: Fingerprint of what the values are.
            values: float64 vector, summed over the workers; may be empty.
            hashes: Of names and values of the common variables, in turn, as unsigned 64-bit
                integers; may be empty.
            stop: Whether this worker wishes that training stops.
            empty: Whether it has nothing to add; it is not alone in it then, if others may come.

        Returns:
            A `Gathered`. If it was closed without this worker, that of the others.
        """
        name = pb.GatherKind.Name(kind).lower()
        body = pb.Gather(
            kind=kind, serial=serial, run=run, layout=layout, hashes=hashes, stop=stop, empty=empty
        )
        vector = np.ascontiguousarray(values, "<f8")
        with self._changed:
            self._asked = (pb.ToAggregator(gather=body), memoryview(vector).cast("B"))
            self._send_first(*self._asked)
            self._awaited = (kind, serial)
            what = f"the other workers' part in gather {serial} ({name}) after run {run}"
            self._wait(lambda: (kind, serial) in self._gathered, what, gives_state=lambda: True)
            self._awaited = self._asked = None
            message, payload = self._gathered[kind, serial]
            self._gathered = {
                k: g for k, g in self._gathered.items() if k[0] != kind or k[1] > serial
            }
        total = np.frombuffer(payload, "<f8")
        if total.size != values.size:
            raise ServiceError(f"Expected {values.size} gathered values. Received: {total.size}.")
        return Gathered(
            total,
            tuple(message.contributors),
            message.reference,
            tuple(message.hashes),
            message.stop,
        )

    def _on_gather_result(self, shard: int, message: pb.GatherResult, payload: memoryview) -> None:
        # What others gathered after runs that this worker is past is of no use to it any more.
        self._gathered = {
            key: (m, p)
            for key, (m, p) in self._gathered.items()
            if m.run >= self._finished or key == self._awaited
        }
        self._gathered[message.kind, message.serial] = (message, payload)
        self._last[message.kind] = (message, payload)

    def _give_stored(self, shard: int) -> None:
        super()._give_stored(shard)
        for message, payload in self._last.values() if not shard else ():
            stored = wire.encode(pb.ToAggregator(stored_gather=message), payload)
            self._connections[shard].send(stored)

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        super()._resend(shard, welcome, is_new)
        if self._asked is not None and not shard:
            self._send_first(*self._asked)
