"""Whether a worker that says hello belongs to the job."""

import grpc

from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# Every worker's stream holds a thread of the server.
MAX_WORKERS = 1000

_SAME_FOR_ALL = (
    "num_workers",
    "cutoff",
    "num_shards",
    "shard",
    "history_rounds",
    "history_bytes",
    "deterministic",
)


def invalid(details: str) -> Refused:
    """Returns the refusal of a message that no correct worker would send."""
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, details)


def check(hello: pb.Hello, first: pb.Hello | None) -> None:
    """Checks what a worker believes about the job.

    Args:
        hello: What it says.
        first: What the first worker has said, if any has.

    Raises:
        Refused: If it cannot be, or is not what the first worker believes.
    """
    if hello.protocol != wire.PROTOCOL:
        raise invalid(
            f"Expected version {wire.PROTOCOL} of the contract. Received: protocol="
            f"{hello.protocol} from worker {hello.worker}. Install the same tf_syncdist "
            "everywhere."
        )
    if not hello.worker < hello.num_workers <= MAX_WORKERS:
        raise invalid(
            "Expected a worker index below the number of workers, and that to be at most "
            f"{MAX_WORKERS}. Received: worker={hello.worker}, num_workers={hello.num_workers}."
        )
    for name in _SAME_FOR_ALL if first is not None else ():
        expected, received = getattr(first, name), getattr(hello, name)
        if expected != received:
            raise invalid(
                f"Expected every worker to be given the same `{name}`: {expected!r}, as worker "
                f"{first.worker} said. Received: {name}={received!r} from worker "
                f"{hello.worker}. Start every task with the same arguments and cluster."
            )
