"""The end of a training that a worker wishes, by a real service over real sockets."""

import functools
import random
import time
from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
SPECS = [TensorSpec("float32", (4,))] * 3


def do_run(session: Session, run: int) -> bytes:
    """Does a run as the controller does; replays it if it is over. Returns its result."""
    way = plan(SPECS, 16, len(session.config.addresses))
    over = session.exchanges_of(run) is not None
    if over:
        assert session.wait_results(run)
    else:
        mine = np.random.default_rng((session.config.worker, run)).normal(size=(3, 4))
        session.send(run, 0, way, list(mine.astype("f4")))
    arrays = [np.empty(4, "f4") for _ in SPECS]
    used, total = session.receive(run, 0, way, arrays)
    fate = Fate.REPLAYED if over else Fate.LATE if used < total else Fate.CONTRIBUTED
    session.finish(run, 1, fate)
    return b"".join(a.tobytes() for a in arrays)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("b", [0, 1, 2])
def test_one_worker_stops_the_training_of_all(serve: Serve, b: int, shards: int) -> None:
    """Whoever wishes it, and although one of them lags behind: all know before they are there."""
    service = serve(3, b=b, shards=shards, history_rounds=1000)

    def work(session: Session) -> tuple[list[int], list[bytes]]:
        worker, run, stops, results = session.config.worker, 0, [], []
        dice = random.Random(worker)
        for fit in range(4):
            start = run
            while (at := session.stop_at(fit)) is None or run < at:
                if worker == fit % 3 and run == start + 5:
                    session.wish_stop(fit, run)
                    session.wish_stop(fit, run)
                time.sleep(0.01 if worker == 2 and run % 3 == 0 else dice.choice((0, 0, 0.001)))
                results.append(do_run(session, run))
                run += 1
            assert run == at, "it knew in time"
            stops.append(run)
            session.gather(pb.STOP, fit, run)
        return stops, results

    first, *others = service.together(*(functools.partial(work, s) for s in service.sessions()))
    assert others == [first] * 2
    assert sorted(set(first[0])) == first[0]


def test_the_first_wish_decides_and_who_comes_later_knows(serve: Serve) -> None:
    service = serve(2, b=1)
    first = service.session(0)
    first.wish_stop(3, 10)
    assert service.until(lambda: first.stop_at(3)) == 10
    second = service.session(1)
    assert service.until(lambda: second.stop_at(3)) == 10
    second.wish_stop(3, 50)
    second.wish_stop(4, 60)
    assert service.until(lambda: first.stop_at(4)) == 60
    assert first.stop_at(3) == second.stop_at(3) == 10 and first.stop_at(5) is None
