"""A service as a process of its own, among strangers who send it anything."""

import concurrent.futures
import random
import re
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.transport import wire
from tf_syncdist.transport.guards import UNKNOWN_METHOD

from .test_child import aggregator, join

THREADS = 8
METHODS = {
    wire.TRAIN: {grpc.StatusCode.INVALID_ARGUMENT},
    wire.REPORT: {grpc.StatusCode.INVALID_ARGUMENT},
    # Some strings happen to be such a message, of a life that nobody knows.
    wire.BEAT: {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK},
    f"/{wire.SERVICE}/Nothing": {grpc.StatusCode.UNIMPLEMENTED},
}
WAY = plan([TensorSpec("float32", (4,))], 100, 1)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in use."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def strings(seed: int, count: int) -> list[bytes]:
    """Random bytes, mostly short; some begin as messages of the contract do."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        size = rng.choice((1, 2, 5, 20, 100, 1000, 20_000))
        begin = rng.choice((b"", b"", b"\n", b"\x0a\x04", b"\x12", b"\x92\x01", b"\xff\xff"))
        found.append(begin + rng.randbytes(size))
    return found


def attack(channel: grpc.Channel, method: str, data: list[bytes]) -> set[grpc.StatusCode]:
    """Sends each string in a call of its own and returns how the calls end."""
    codes = set()
    train, unary = channel.stream_stream(method), channel.unary_unary(method)
    for one in data:
        try:
            if method == wire.TRAIN:
                for _ in train(iter([one]), timeout=60):
                    pass
            else:
                unary(one, timeout=60)
        except grpc.RpcError as e:
            codes.add(e.code())
        else:
            codes.add(grpc.StatusCode.OK)
    return codes


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(290)
def test_random_strings_to_every_method_change_nothing(count: int) -> None:
    with aggregator() as (process, port):
        # The pipe of its output must not fill up.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        sizes = []
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}", wire.CHANNEL_OPTIONS) as channel,
            concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        ):
            for turn, share in enumerate((count // 5, count - count // 5)):
                for method, codes in METHODS.items():
                    each = [strings(10 * turn + n, share // THREADS) for n in range(THREADS)]
                    ends = pool.map(lambda d, m=method: attack(channel, m, d), each)
                    # The few strings that are messages may be missing in a small share.
                    found = set().union(*ends)
                    assert codes - {grpc.StatusCode.OK} <= found <= codes, method
                sizes.append(resident_bytes(process.pid))
            assert process.poll() is None
        assert sizes[1] < sizes[0] + 8 * 2**20, sizes
        session = join(port)
        session.send(0, 0, WAY, [np.ones(4, "f4")])
        assert session.receive(0, 0, WAY, [np.empty(4, "f4")]) == (1, 1)
        refused = dict(session.report().refused)
        assert refused.pop(UNKNOWN_METHOD) == count
        assert 2.5 * count < sum(refused.values()) <= 3 * count
        session.close()
