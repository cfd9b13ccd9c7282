"""A worker that does rounds of 8 MB and checks their sums: `rounds.py ADDRESS WORKER WORKERS`.

It prints "round R" after round R, and in the end how that came about. Values are whole numbers:
in round r element i of worker w is (w + 1) * (r % 100 + 1) + i % 7, so that all sums are exact.
A fourth argument lets it do something else too: "scribble" writes into its shared memory all the
time and tries to shrink it, "dies" is killed when that could be used for the first time, and
"spoiled" has no look at the sums.
"""

import os
import signal
import sys
import threading

import numpy as np

from tf_syncdist import cutoff
from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.errors import SyncDistError
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.transport import memory
from tf_syncdist.transport.session import Session, SessionConfig

ELEMENTS = 2 * 2**20
PATTERN = (np.arange(ELEMENTS) % 7).astype("f4")


def possible(run: int, workers: int, me: int) -> list[float]:
    """What element 0 of a sum may be: some worker may be gone, and this one is there."""
    scale = run % 100 + 1
    every = set(range(workers))
    sums = []
    for gone in [set(), *({w} for w in every - {me})]:
        there = every - gone
        sums.append((sum(w + 1 for w in there) * scale) * workers / len(there))
    return sums


def check(out: np.ndarray, run: int, session: Session, step: int) -> None:
    """Checks a sum, slice by slice: in the round in which a worker is lost they differ."""
    workers, me = session.config.num_workers, session.config.worker
    expected = possible(run, workers, me)
    for start in range(0, ELEMENTS, step):
        part = out[start : start + step] - workers * PATTERN[start : start + step]
        if part[0] not in np.float32(expected) or np.any(part != part[0]):
            raise AssertionError(f"round {run}, element {start}: {part[0]}, not of {expected}")


def scribble(session: Session) -> None:
    """Writes into the memory that the service is reading, and tries to take it away."""
    lending = session._lending[0]  # noqa: SLF001
    while True:
        for segment in list(lending._segments.values()):  # noqa: SLF001
            segment.data[::4096] = 7
            try:
                os.ftruncate(segment.offer.fd, 0)
            except PermissionError:
                continue
            os._exit(77)


def main(address: str, worker: str, workers: str, how: str = "") -> None:
    """Does rounds until something happens."""
    config = SessionConfig(
        (address,),
        int(worker),
        int(workers),
        cutoff.serialize(cutoff.BackupWorkers(0)),
        transport="auto",
        history_rounds=1,
        history_bytes=0,
        connect_timeout_seconds=30.0,
        timeout_seconds=60.0,
    )
    session = Session(config, lambda text: print(f"notice {text}", flush=True))
    # A service that is killed is given up soon; until it has come it may take its time.
    session.config = config._replace(connect_timeout_seconds=3.0)
    way = plan([TensorSpec("float32", (ELEMENTS,))], 2**20, 1)
    if how == "dies":
        memory.Lending.answered = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if how == "scribble":
        threading.Thread(target=scribble, args=(session,), daemon=True).start()
    out = np.empty(ELEMENTS, "f4")
    run = 0
    try:
        while True:
            mine = PATTERN + np.float32((config.worker + 1) * (run % 100 + 1))
            session.send(run, 0, way, [mine])
            session.receive(run, 0, way, [out])
            if how not in ("spoiled", "scribble"):
                check(out, run, session, 2**18)
            session.finish(run, 1, Fate.CONTRIBUTED)
            print(f"round {run}", flush=True)
            run += 1
    except SyncDistError as e:
        print(f"error {type(e).__name__}: {e}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
