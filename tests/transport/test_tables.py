"""Gradients of embeddings travel as the rows that are not zero."""

from collections.abc import Callable

import numpy as np
import pytest

from tf_syncdist.aggregation.rounds import Fate
from tf_syncdist.propagation import rows, slices
from tf_syncdist.propagation.rows import Rows
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.transport import wire
from tf_syncdist.transport.session import Session

Serve = Callable[..., object]
NUM_ROWS, WIDTH = 1000, 4
SPECS = [
    TensorSpec("float32", (7,)),
    TensorSpec("float32", (NUM_ROWS, 2, 2), by_rows=True),
    TensorSpec("float32", (50,)),
]


def mine(worker: int, run: int, count: int) -> list[np.ndarray | Rows]:
    """A worker's values, with rows that come several times; all sums of them are exact."""
    rng = np.random.default_rng((worker, run))
    values = rng.integers(-999, 999, (count, WIDTH)).astype("f4")
    table = Rows(rng.integers(0, NUM_ROWS, count), values)
    small, large = (rng.integers(-999, 999, s.shape).astype("f4") for s in SPECS[::2])
    return [small, table, large]


def whole(values: list[np.ndarray | Rows]) -> list[np.ndarray]:
    """The same as whole tensors."""
    table = rows.dense(rows.unique(values[1]), NUM_ROWS)
    return [values[0], table.reshape(SPECS[1].shape), values[2]]


@pytest.mark.parametrize("table_bytes", [1 << 26, 5000], ids=["one_slice", "many_slices"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "counts", [(3, 5, 0), (700, 20, 300), (3000, 3000, 3000)], ids=["few", "some", "all"]
)
def test_everybody_gets_the_sum(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    table_bytes: int,
    shards: int,
    counts: tuple[int, ...],
) -> None:
    monkeypatch.setattr(slices, "_TABLE_BYTES", table_bytes)
    way = plan(SPECS, 64, shards)
    service = serve(3, shards=shards)

    def work(session: Session) -> list[list[np.ndarray]]:
        results = []
        for run in range(4):
            count = counts[(session.config.worker + run) % 3]
            session.send(run, 0, way, mine(session.config.worker, run, count))
            out = [np.full(s.shape, -7, "f4") for s in SPECS]
            assert session.receive(run, 0, way, out) == (len(way.slices),) * 2
            session.finish(run, 1, Fate.CONTRIBUTED)
            results.append(out)
        return results

    found = service.together(*(lambda s=s: work(s) for s in service.sessions()))
    for run in range(4):
        every = [whole(mine(w, run, counts[(w + run) % 3])) for w in range(3)]
        expected = [sum(tensors) for tensors in zip(*every, strict=True)]
        for result in found:
            for a, b in zip(result[run], expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_few_rows_are_few_bytes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    encode = wire.encode

    def counted(header: object, *pieces: object) -> bytes:
        message = encode(header, *pieces)
        sent.append(len(message))
        return message

    monkeypatch.setattr(wire, "encode", counted)
    (session,) = serve(1).sessions()
    way = plan(SPECS, 64, 1)
    session.send(0, 0, way, mine(0, 0, 10))
    out = [np.zeros(s.shape, "f4") for s in SPECS]
    session.receive(0, 0, way, out)
    for a, b in zip(out, whole(mine(0, 0, 10)), strict=True):
        np.testing.assert_array_equal(a, b)
    # 10 rows of 24 bytes, there and back, of a table of 16 kB.
    assert max(sent) < 500
