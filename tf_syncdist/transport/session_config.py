"""What a worker's side of a job is told when it begins."""

from typing import NamedTuple

from tf_syncdist.observability.timeline import Timeline
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials


class SessionConfig(NamedTuple):
    """What a worker tells the service about itself and the job.

    Args:
        addresses: Address of every shard; the first one decides.
        worker: Index of this worker.
        num_workers: How many workers the job has.
        cutoff: The cutoff policy, serialized.
        history_rounds: See `SyncReplicasStrategy`.
        history_bytes: See `SyncReplicasStrategy`.
        connect_timeout_seconds: How long to wait for the service to answer.
        timeout_seconds: How long to wait for other workers.
        transport: "auto", "grpc" or "shared_memory"; see `SyncReplicasStrategy`.
        deterministic: See `SyncReplicasStrategy`.
        address: "host:port" by which people know this worker.
        min_workers: See `SyncReplicasStrategy`.
        detection_seconds: See `SyncReplicasStrategy`.
        credentials: What it shows to the service, and demands of it.
        propagation: How gradients travel, serialized.
        credit_bytes: See `PriorityPropagation`; 0 if slices leave in the order in which they come.
        runs_ahead: By how many runs this worker may be ahead of the last one it has finished.
        limit_gbps: How much may pass in each direction; 0 for no limit.
        timeline: Where it is recorded what slices do.
        centre: How the service mixes models with a centre that it holds, serialized; empty if it
            holds none.
        serves: "host:port" at which this worker serves its own model; empty if it does not.
        strategy: The strategy, and what all workers must give it alike that is not said above.
    """

    addresses: tuple[str, ...]
    worker: int
    num_workers: int
    cutoff: str
    history_rounds: int = 4
    history_bytes: int = 512 * 2**20
    connect_timeout_seconds: float = 30.0
    timeout_seconds: float = 600.0
    transport: str = "auto"
    deterministic: bool = False
    address: str = ""
    min_workers: int = 1
    detection_seconds: float = 3.0
    credentials: Credentials = NO_CREDENTIALS
    propagation: str = ""
    credit_bytes: int = 0
    runs_ahead: int = 0
    limit_gbps: float = 0.0
    timeline: Timeline | None = None
    centre: str = ""
    serves: str = ""
    strategy: str = ""
