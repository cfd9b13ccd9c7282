"""Memory that processes share: nothing is left behind, and no process can harm another by it."""

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tf_syncdist
from tf_syncdist.transport.segments import Offer, Segment, SegmentError, host_id

_ROOT = Path(tf_syncdist.__file__).parents[1]


@contextlib.contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen]:
    """Runs Python code beside this process; it is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


CREATES = """
from tf_syncdist.transport.segments import Segment
segment = Segment.create(1_000_000)
segment.data[:] = 7
print(*segment.offer[:3], segment.offer.token.hex(), flush=True)
while line := input():
    segment.data[:] = int(line)
    print("done", flush=True)
"""


def offered(process: subprocess.Popen) -> Offer:
    """Reads what a process offers that runs `CREATES`."""
    pid, fd, size, token = process.stdout.readline().split()
    return Offer(int(pid), int(fd), int(size), bytes.fromhex(token))


def test_another_process_reads_what_is_written() -> None:
    with another_process(CREATES) as process, Segment.open(offered(process)) as segment:
        assert segment.data.nbytes == 1_000_000
        assert np.all(segment.data == 7)
        print(9, file=process.stdin, flush=True)
        assert process.stdout.readline() == "done\n"
        assert np.all(segment.data == 9)


def test_memory_outlives_its_creator_and_has_no_name() -> None:
    with another_process(CREATES) as process:
        segment = Segment.open(offered(process))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
    assert np.all(segment.data == 7)
    data = segment.data
    segment.close()
    segment.close()
    assert np.all(data == 7)
    assert not [name for name in os.listdir("/dev/shm") if "syncdist" in name]


def test_nobody_but_the_creator_can_write_and_nobody_can_change_the_size() -> None:
    with another_process(CREATES) as process:
        offer = offered(process)
        with pytest.raises(ValueError, match="read-only"):
            Segment.open(offer).data[0] = 1
        fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDWR)
        try:
            for attempt in (
                lambda: mmap.mmap(fd, 4096),
                lambda: os.ftruncate(fd, 0),
                lambda: os.ftruncate(fd, 10_000_000),
                lambda: os.pwrite(fd, b"x", 5000),
            ):
                with pytest.raises(OSError) as caught:
                    attempt()
                assert caught.value.errno == errno.EPERM
        finally:
            os.close(fd)


def test_what_is_no_segment_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 100_000)
    reading, writing = os.pipe()
    with (
        another_process(CREATES) as process,
        Segment.create(100) as closed,
        contextlib.ExitStack() as stack,
    ):
        good = offered(process)
        fds = [os.open(file, os.O_RDONLY), unsealed, reading, writing]
        for fd in fds:
            stack.callback(os.close, fd)
        closed.close()
        mine = Offer(os.getpid(), 0, 100, good.token)
        wrong = [
            *(mine._replace(fd=fd) for fd in fds),
            closed.offer,
            good._replace(token=bytes(16)),
            good._replace(token=b""),
            good._replace(size=good.size + 1),
            good._replace(size=2**63),
            good._replace(size=2**64 - 1),
            good._replace(pid=2**31 - 1),
            good._replace(fd=2**31 - 1),
        ]
        for offer in wrong:
            with pytest.raises(SegmentError):
                Segment.open(offer)
        Segment.open(good).close()


def test_memory_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(SegmentError, match="cannot be had"):
        Segment.create(2**55)


def test_nothing_of_a_closed_segment_is_left() -> None:
    segment = Segment.create(100)
    inode = os.stat(f"/proc/self/fd/{segment.offer.fd}").st_ino

    # What belongs to other tests' threads may come and go meanwhile.
    def maps() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum("memfd:tf_syncdist" in line and f" {inode} " in line for line in lines)

    def descriptors() -> int:
        count = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                count += os.stat(f"/proc/self/fd/{fd}").st_ino == inode
        return count

    reader = Segment.open(segment.offer)
    assert maps() == 2 and descriptors() > 0
    segment.close()
    reader.close()
    del segment, reader
    assert (maps(), descriptors()) == (0, 0)


def test_the_host_is_the_same_in_another_process() -> None:
    code = "from tf_syncdist.transport.segments import host_id; print(host_id())"
    with another_process(code) as process:
        assert process.stdout.readline().strip() == host_id() != ""
