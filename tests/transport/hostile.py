"""What the tests of messages that no correct worker sends have in common."""

import contextlib
import time
import tracemalloc
from collections.abc import Iterator

from tf_syncdist import cutoff
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport import wire


def hello(worker: int, num_workers: int, b: int, **changes: object) -> pb.Hello:
    """A worker's first message."""
    policy = cutoff.serialize(cutoff.BackupWorkers(b))
    config = {
        "protocol": wire.PROTOCOL,
        "num_shards": 1,
        "cutoff": policy,
        "min_workers": 1,
        "detection_seconds": 3.0,
    }
    return pb.Hello(**{**config, "worker": worker, "num_workers": num_workers, **changes})


@contextlib.contextmanager
def at_most(size: int = 4 * 2**20, seconds: float = 1.0) -> Iterator[None]:
    """Checks what something takes of memory and of this thread's time."""
    tracemalloc.start()
    before = time.thread_time()
    try:
        yield
    finally:
        took, (_, peak) = time.thread_time() - before, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < size and took < seconds
