"""Whether a worker that says hello belongs to the job."""

import grpc

from tf_syncdist.aggregation.outbox import Refused
from tf_syncdist.propagation.policies import MAX_CREDIT_BYTES
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire

# Every worker's stream holds a thread of the server.
MAX_WORKERS = 1000

# No job has so many; what is counted from it stays within 64 bits.
_MOST_RUNS = 2**48

_SAME_FOR_ALL = (
    "num_workers",
    "strategy",
    "cutoff",
    "num_shards",
    "shard",
    "history_rounds",
    "history_bytes",
    "deterministic",
    "min_workers",
    "detection_seconds",
    "propagation",
    "credit_bytes",
    "runs_ahead",
    "centre",
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
    if not 1 <= hello.min_workers <= hello.num_workers or not (
        0.1 <= hello.detection_seconds <= 3600.0
    ):
        raise invalid(
            "Expected min_workers from 1 to the number of workers, and detection_seconds from 0.1 "
            f"to 3600. Received: min_workers={hello.min_workers}, "
            f"detection_seconds={hello.detection_seconds:g} from worker {hello.worker}."
        )
    if hello.runs_ahead > 1 or hello.credit_bytes > MAX_CREDIT_BYTES:
        raise invalid(
            f"Expected runs_ahead of at most 1 and credit_bytes of at most {MAX_CREDIT_BYTES}. "
            f"Received: runs_ahead={hello.runs_ahead}, credit_bytes={hello.credit_bytes} from "
            f"worker {hello.worker}."
        )
    if hello.standing.run > _MOST_RUNS:
        raise invalid(
            f"Expected a worker that has done at most {_MOST_RUNS} runs. Received: "
            f"run={hello.standing.run} from worker {hello.worker}."
        )
    for name in _SAME_FOR_ALL if first is not None else ():
        expected, received = getattr(first, name), getattr(hello, name)
        if expected != received:
            raise invalid(
                f"Expected every worker to be given the same `{name}`: {expected!r}, as worker "
                f"{first.worker} said. Received: {name}={received!r} from worker "
                f"{hello.worker}. Start every task with the same arguments and cluster."
            )


def check_standing(hello: pb.Hello, job_seed: int, service: int, runs_over: int) -> None:
    """Checks that a worker that comes back was in this job, and can go on in it.

    Args:
        hello: What it says.
        job_seed: The job's.
        service: This life of the service.
        runs_over: How many runs are over.

    Raises:
        Refused: If not.
    """
    standing = hello.standing
    if standing.job_seed != job_seed:
        raise Refused(
            grpc.StatusCode.ABORTED,
            "Expected a worker of the job that this service serves. Received: worker "
            f"{hello.worker} of another job. Start one service per job.",
        )
    if standing.service != service and standing.run > runs_over:
        # It has done a round alone, which is now being done anew without it.
        raise Refused(
            grpc.StatusCode.ABORTED,
            f"Expected worker {hello.worker} while the others came back to a service that was "
            f"started again. Received: it came later, from round {standing.run}, while the others "
            f"are in round {runs_over}. Start the worker again; it takes over another's state.",
        )
