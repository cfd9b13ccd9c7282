"""A model as workers hand it to one another: variables in a fixed cut, in messages of one step."""

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import ModelMismatchError
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_peers_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.copies import copy_in, copy_out
from tf_syncdist.transport.states import Spec

_PART_BYTES = 2 * 2**20


class Refusal(ValueError):
    """What came is no part of a model that belongs here; the text says what was expected."""


class OtherTraining(Refusal):
    """What came is of a training that this worker has left, or not come to yet. Nobody's fault."""


class Model(NamedTuple):
    """A worker's model after one of its steps.

    Args:
        step: How many steps it had taken.
        values: The variables as flat arrays.
    """

    step: int
    values: list[np.ndarray]


class ModelFormat:
    """How the models of a job look on the wire.

    Args:
        variables: Name, dtype and shape of every variable.
        job_seed: Names the job.
        worker: The worker whose models are written.
        key: Which training they are of: the fit in which it began, and how often the program has
            written the variables itself in it. Those of different trainings are not mixed.

    Attributes:
        key: That.
        nbytes: Size of a model.
        layout: Fingerprint of the variables and the cut.
        specs: The variables.
    """

    def __init__(
        self,
        variables: Sequence[Spec],
        job_seed: int,
        worker: int,
        key: tuple[int, int] = (0, 0),
    ) -> None:
        self.key = key
        way = plan([TensorSpec(d, tuple(s)) for _, d, s in variables], _PART_BYTES, 1)
        self.specs = [pb.PeerVariable(name=n, dtype=d, shape=s) for n, d, s in variables]
        self.nbytes = sum(part.nbytes for part in way.slices)
        self.layout = way.layout
        self._parts = sorted(way.slices, key=lambda part: part.index)
        self._tensors = [(int(np.prod(s)), d) for _, d, s in variables]
        self._job_seed = job_seed
        self._worker = worker

    def of_training(self, key: tuple[int, int]) -> "ModelFormat":
        """Returns how the models of another training with the same variables look."""
        other = copy.copy(self)
        other.key = key
        return other

    def pull_request(self) -> bytes:
        """Returns the request for another worker's model."""
        fit, revision = self.key
        request = pb.PullRequest(
            job_seed=self._job_seed,
            worker=self._worker,
            layout=self.layout,
            fit=fit,
            revision=revision,
        )
        return wire.encode(pb.ToPeer(pull=request))

    def write(self, model: Model) -> tuple[bytes, ...]:
        """Returns the messages in which a model travels."""
        messages = []
        for part in self._parts:
            frame: wire.Frame[pb.ToPeer] = wire.Frame(part.nbytes)
            copy_in(part, model.values, frame.payload)
            header = pb.ModelPart(
                job_seed=self._job_seed,
                worker=self._worker,
                layout=self.layout,
                step=model.step,
                part=part.index,
                num_parts=len(self._parts),
                fit=self.key[0],
                revision=self.key[1],
            )
            messages.append(frame.seal(pb.ToPeer(part=header)))
        return tuple(messages)

    def read(self, messages: Iterable[bytes], worker: int | None = None) -> Model | None:
        """Returns the model in some messages; `None` if there is none at all.

        Args:
            messages: The messages, which are taken as they come.
            worker: Whose model it must be; anybody's by default.

        Raises:
            OtherTraining: If they are of another training.
            Refusal: If they are not a whole model of one step.
        """
        values = [np.empty(n, d) for n, d in self._tensors]
        first: pb.ModelPart | None = None
        count = 0
        for data in messages:
            try:
                header, payload = wire.decode(pb.ToPeer, data)
            except wire.WireError as e:
                raise Refusal(str(e)) from e
            if header.WhichOneof("body") != "part":
                raise Refusal("Expected a part of a model. Received: another message.")
            one = header.part
            self.check(one)
            first = first or one
            of_one = (first.worker, first.step) == (one.worker, one.step)
            in_turn = one.part == count < one.num_parts == len(self._parts)
            if not (of_one and in_turn) or worker not in (None, one.worker):
                raise Refusal(
                    f"Expected part {count} of {len(self._parts)} of a model of one worker and "
                    f"step. Received: part {one.part} of {one.num_parts} of worker {one.worker}'s "
                    f"model after step {one.step}."
                )
            part = self._parts[count]
            if payload.nbytes != part.nbytes:
                raise Refusal(
                    f"Expected {part.nbytes} bytes in part {count} of a model. Received: "
                    f"{payload.nbytes} bytes from worker {one.worker}."
                )
            copy_out(part, payload, values)
            count += 1
        if first is None and self._parts:
            return None
        if count < len(self._parts):
            raise Refusal(
                f"Expected {len(self._parts)} parts of a model. Received: {count} of them."
            )
        return Model(first.step if first is not None else 0, values)

    def check(self, said: pb.PullRequest | pb.ModelPart) -> None:
        """Checks that what another worker says is about models of this training.

        Raises:
            OtherTraining: If it is about another training.
            Refusal: If it is about no models like these.
        """
        if said.job_seed != self._job_seed:
            raise Refusal(
                f"Expected a worker of the same job. Received: worker {said.worker} of another "
                "one. End what is left of the other job."
            )
        if (said.fit, said.revision) != self.key:
            raise OtherTraining(
                f"Expected a model of the training that began in fit {self.key[0]}. Received: one "
                f"of fit {said.fit} from worker {said.worker}."
            )
        if said.layout != self.layout:
            raise Refusal(
                "Expected models with the same variables. Received: other variables, from worker "
                f"{said.worker}. Build the same model on every worker."
            )

    def has_variables_of(self, reply: pb.GreetReply) -> bool:
        """Returns whether another worker has the same variables."""
        return [_described(v) for v in self.specs] == [_described(v) for v in reply.variables]

    def compare(self, reply: pb.GreetReply) -> None:
        """Compares this worker's variables with those of another one.

        Raises:
            ModelMismatchError: If they differ; it names the first difference.
        """
        mine, theirs = map(_described, self.specs), map(_described, reply.variables)
        pairs = zip(mine, theirs, strict=False)
        index, found = next(
            ((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]), (0, None)
        )
        if found is None and len(self.specs) == len(reply.variables):
            return
        here = f"worker {self._worker}"
        if found is None:
            received = (
                f"{len(self.specs)} variable(s) on {here} and {len(reply.variables)} on worker "
                f"{reply.worker}"
            )
        else:
            received = (
                f"variable {index} is {found[0]} on {here} and {found[1]} on worker {reply.worker}"
            )
        raise ModelMismatchError(
            f"Expected every worker to train the same variables. Received: {received}. Build the "
            "same model and use the same optimizer on every worker."
        )


def _described(variable: pb.PeerVariable) -> str:
    return f"{variable.name} ({variable.dtype}, shape {list(variable.shape)})"[:500]
