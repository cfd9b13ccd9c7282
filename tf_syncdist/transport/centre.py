"""A worker's part in a centre that the service holds, and with which workers mix their models.

Nobody waits for another worker here, but where there is no centre yet. A slice travels as a request
and its answer; so many bytes are on their way at a time that the service keeps little besides the
centre itself.

The first shard decides which centre it is and who gives it. So a worker asks the other shards only
when the first one has answered, and who is asked to give it gives to the first one last: the others
learn there that the centre is there, and it is one worker's on all shards. Only if that worker
fails when it has given to some shards, another one gives to the rest.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import ModelMismatchError, ServiceError
from tf_syncdist.propagation.slices import Plan, Slice
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.allocator import keep_freed_memory
from tf_syncdist.transport.copies import copy_in, copy_out
from tf_syncdist.transport.link import Link
from tf_syncdist.transport.session_config import SessionConfig
from tf_syncdist.transport.states import Spec

_WINDOW_BYTES = 16 * 2**20

_DTYPES = {"float32": pb.FLOAT32, "float64": pb.FLOAT64}

Key = tuple[int, int]


class Mixed(NamedTuple):
    """What came of an exchange with the centre.

    Args:
        staleness: How often a slice had taken in other values since this worker's were read; the
            most of all slices.
        slices: How many slices there are.
        too_stale: How many of them have left this worker's values out for that.
    """

    staleness: int
    slices: int
    too_stale: int


class _Conversation:
    """An exchange in progress: what is still to be asked for, and by which messages."""

    def __init__(self, plan: Plan, num_shards: int) -> None:
        self.todo: list[collections.deque[Slice]] = [collections.deque() for _ in range(num_shards)]
        for part in plan.slices:
            self.todo[part.shard].append(part)
        self.pending = [0] * num_shards
        # What was asked for and not answered, and what asks for it again.
        self.asked: dict[Key, tuple[Slice, Callable[[], bytes]]] = {}

    def next(self, shard: int) -> Slice | None:
        """Returns what may be asked for now."""
        todo = self.todo[shard]
        if not todo or (self.pending[shard] and self.pending[shard] >= _WINDOW_BYTES):
            return None
        part = todo.popleft()
        self.pending[shard] += part.nbytes
        return part

    @property
    def is_over(self) -> bool:
        """Whether all has been answered."""
        return not self.asked and not any(self.todo)


class CentreExchanging(Link):
    """The part of a session that is about the centre.

    One thread at a time may use it.
    """

    def __init__(self, config: SessionConfig, on_notice: Callable[[str], None]) -> None:
        super().__init__(config, on_notice)
        shards = len(config.addresses)
        self._centre_variables: list[pb.VariableSpec] = []
        self._centre_key, self._centre_joins = (0, 0), True
        self._centre_plan: Plan | None = None
        # The newest centre that this worker has, and the version of each slice; None: never had.
        self._centre: list[np.ndarray] = []
        self._centre_versions: list[list[int | None]] = [[] for _ in range(shards)]
        # Of what this worker trains with. It may look at the centre without going on from it.
        self._own_versions: list[list[int]] = [[] for _ in range(shards)]
        self._centre_there = [False] * shards
        # Which shards know that this worker wants it, whether the first one asks for it, and
        # whether it was looked for once more.
        self._centre_opened = [False] * shards
        self._centre_wanted = self._centre_sought = False
        self._centre_error = ""
        self._conversation: _Conversation | None = None
        self._answers: list[tuple[int, pb.CentreValue, memoryview]] = []
        # Another process of this worker begins with another number.
        self._serial = self._incarnation

    def open_centre(
        self,
        variables: Sequence[Spec],
        plan: Plan,
        values: Sequence[np.ndarray],
        key: tuple[int, int] = (0, 0),
        joins: bool = True,
    ) -> tuple[list[np.ndarray], tuple[int, int]]:
        """Waits until there is a centre, and returns it.

        Args:
            variables: Name, dtype and shape of the variables of this worker's model.
            plan: How they are cut.
            values: Their values, which are the centre if this worker is asked for it.
            key: Which centre it is: the training in which it began, and how often the program had
                written the variables itself within that; counted alike by every worker.
            joins: Whether this worker begins, so that another centre will do if the others are
                there.

        Returns:
            What the centre holds, as flat arrays that the next call overwrites, and which it is.

        Raises:
            ModelMismatchError: If other workers mix other variables.
        """
        specs = [pb.VariableSpec(name=n, dtype=d, shape=s) for n, d, s in variables]
        with self._changed:
            self._centre_variables = specs
            self._centre_key, self._centre_joins = key, joins
            self._centre_error = ""
            self._centre_plan = plan
            self._centre = [np.array(v).reshape(-1) for v in values]
            self._centre_versions = [[None] * n for n in plan.num_slices]
            self._own_versions = [[0] * n for n in plan.num_slices]
            self._centre_there = [False] * len(self._connections)
            self._centre_opened = [False] * len(self._connections)
            self._centre_wanted = self._centre_sought = False
            self._send_open(0)

            def there() -> bool:
                return bool(self._centre_error) or all(self._centre_there)

            self._wait(there, "a worker that has the centre, worker 0 at the start")
            if self._centre_error:
                raise ModelMismatchError(self._centre_error)
            key = self._centre_key
        return self.read_centre(goes_on_from_it=True), key

    def read_centre(self, goes_on_from_it: bool = False) -> list[np.ndarray]:
        """Returns what the centre holds now, as flat arrays that the next call overwrites.

        Args:
            goes_on_from_it: Whether this worker trains with it from now on. If it only looks, what
                it mixes next is as stale as if it had not.
        """
        self._converse(pb.CENTRE_READ, None)
        if goes_on_from_it:
            self._go_on_from_centre()
        return self._centre

    def mix(self, values: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Mixed]:
        """Lets the centre take in values, by the rule of the job.

        Args:
            values: Flat arrays, of this worker's model or of what has changed in it.

        Returns:
            What the service answers, as flat arrays that are written to by the next call; and what
            became of the values.
        """
        mixed = self._converse(pb.CENTRE_MIX, values)
        self._go_on_from_centre()
        return self._centre, mixed

    # How.

    def _go_on_from_centre(self) -> None:
        self._own_versions = [[v or 0 for v in versions] for versions in self._centre_versions]

    def _converse(self, action: int, values: Sequence[np.ndarray] | None) -> Mixed:
        plan = self._centre_plan
        talk = _Conversation(plan, len(self._connections))
        with self._changed:
            self._serial = (self._serial + 1) % 2**64
            serial = self._serial
            self._conversation = talk
            self._answers.clear()
        staleness = too_stale = 0
        try:
            for shard in range(len(talk.todo)):
                self._ask_centre(talk, shard, action, serial, values)
            while not talk.is_over:
                with self._changed:
                    self._wait(lambda: bool(self._answers), "an answer about the centre")
                    answers, self._answers = self._answers, []
                for shard, answer, payload in answers:
                    if answer.serial != serial or (shard, answer.slice) not in talk.asked:
                        continue
                    self._take_centre(talk, shard, answer, payload)
                    staleness = max(staleness, answer.staleness)
                    too_stale += answer.verdict == pb.CENTRE_TOO_STALE
                    self._ask_centre(talk, shard, action, serial, values)
        finally:
            with self._changed:
                self._conversation = None
                for lending in self._lending:
                    if lending is not None:
                        lending.done(serial)
        return Mixed(staleness, len(plan.slices), too_stale)

    def _ask_centre(
        self,
        talk: _Conversation,
        shard: int,
        action: int,
        serial: int,
        values: Sequence[np.ndarray] | None,
    ) -> None:
        """Asks a shard for as much as may be on its way."""
        plan = self._centre_plan
        while (part := talk.next(shard)) is not None:
            version = self._own_versions[shard][part.index]
            header = self._centre_header(action, part, serial, version)
            again = functools.partial(_message, header, part, values)
            message: Callable[[], bytes] | bytes = again
            lent = None
            if values is not None:
                lent = self._lend(shard, serial, 0, plan.nbytes[shard])
            if lent is not None:
                located = pb.CentreRequest()
                located.CopyFrom(header)
                located.location.segment, data = lent
                located.location.offset = part.offset
                copy_in(part, values, data[part.offset : part.offset + part.nbytes])
                message = wire.encode(pb.ToAggregator(centre_request=located))
            with self._changed:
                talk.asked[shard, part.index] = (part, again)
                if self._centre_there[shard]:
                    self._post(shard, message)

    def _take_centre(
        self, talk: _Conversation, shard: int, answer: pb.CentreValue, payload: memoryview
    ) -> None:
        with self._changed:
            part, _ = talk.asked.pop((shard, answer.slice))
        talk.pending[shard] -= part.nbytes
        if len(payload) != part.nbytes:
            raise ServiceError(
                f"Expected {part.nbytes} bytes for slice {part.index} of the centre. Received: "
                f"{len(payload)}. Every task must run the same version of tf_syncdist."
            )
        copy_out(part, payload, self._centre)
        self._centre_versions[shard][answer.slice] = answer.version

    def _centre_header(
        self, action: int, part: Slice, serial: int, version: int
    ) -> pb.CentreRequest:
        return pb.CentreRequest(
            action=action,
            slice=part.index,
            serial=serial,
            version=version,
            dtype=_DTYPES[part.dtype],
            elements=part.elements,
            layout=self._centre_plan.layout,
        )

    def _send_open(self, shard: int) -> None:
        self._centre_opened[shard], self._centre_there[shard] = True, False
        plan = self._centre_plan
        opened = pb.CentreOpen(
            variables=self._centre_variables,
            layout=plan.layout,
            num_slices=plan.num_slices[shard],
            fit=self._centre_key[0],
            revision=self._centre_key[1],
            joins=self._centre_joins,
        )
        self._send(shard, pb.ToAggregator(centre_open=opened))

    def _stand(self, shard: int, standing: pb.Standing) -> None:
        super()._stand(shard, standing)
        versions = self._centre_versions[shard]
        if self._centre_plan is not None and None not in versions:
            standing.centre_version = sum(versions) + 1
            standing.centre_fit, standing.centre_revision = self._centre_key

    def _resend(self, shard: int, welcome: pb.Welcome, is_new: bool) -> None:
        super()._resend(shard, welcome, is_new)
        self._centre_there[shard] = False
        if not shard:
            self._centre_wanted = False
        if self._centre_opened[shard]:
            self._send_open(shard)

    def _on_centre_state(self, shard: int, message: pb.CentreState, *_: object) -> None:
        if message.error:
            self._centre_error = message.error
            return
        key = (message.fit, message.revision)
        if key != self._centre_key and (shard or not self._centre_joins):
            return  # Said before this worker went on to another one.
        if not shard:
            self._centre_key, self._centre_joins = key, False
            self._centre_wanted = message.give
            if message.give:
                # A shard that is started again now has to ask this worker, and nobody else.
                self._centre_versions = [[v or 0 for v in vs] for vs in self._centre_versions]
            for other, is_open in enumerate(self._centre_opened):
                if not is_open:
                    self._send_open(other)
        elif message.give and self._centre_there[0] and None in self._centre_versions[shard]:
            self._seek_centre(shard)
        elif message.give:
            self._give_centre(shard)
        if message.there:
            self._centre_there[shard] = True
            if self._conversation is not None:
                for (owner, _), (_, again) in self._conversation.asked.items():
                    if owner == shard:
                        self._post(shard, again)
        if self._centre_wanted and all(self._centre_there[1:]):
            self._centre_wanted = False
            self._give_centre(0)

    def _seek_centre(self, shard: int) -> None:
        """Asks the first shard again: the others have left the centre that it has told of.

        If it tells of the same one, that is lost on this shard, and this worker's values will do.
        """
        if self._centre_sought:
            self._give_centre(shard)
            return
        self._centre_sought = self._centre_joins = True
        self._centre_opened = [False] * len(self._centre_opened)
        self._send_open(0)

    def _give_centre(self, shard: int) -> None:
        for part in self._centre_plan.slices:
            if part.shard == shard:
                version = self._centre_versions[shard][part.index] or 0
                header = self._centre_header(pb.CENTRE_GIVE, part, 0, version)
                give = functools.partial(_message, header, part, self._centre)
                self._post(shard, give)

    def _on_centre_value(self, shard: int, message: pb.CentreValue, payload: memoryview) -> None:
        if self._conversation is not None:
            self._answers.append((shard, message, payload))


def _message(header: pb.CentreRequest, part: Slice, values: Sequence[np.ndarray] | None) -> bytes:
    """Returns a request with its values in the message."""
    if values is None:
        return wire.encode(pb.ToAggregator(centre_request=header))
    keep_freed_memory()
    frame: wire.Frame[pb.ToAggregator] = wire.Frame(part.nbytes)
    copy_in(part, values, frame.payload)
    return frame.seal(pb.ToAggregator(centre_request=header))
