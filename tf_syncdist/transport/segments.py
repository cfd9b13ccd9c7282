"""Memory that two processes of one machine share.

A segment is a `memfd`: it has no name, so nothing is left behind however its processes end. It
cannot be shrunk, so that no process can make another one fault, and only its creator can write.
The other process opens it through /proc, which takes the same user and process namespace.
"""

import fcntl
import mmap
import os
import secrets
import sys
from typing import NamedTuple

import numpy as np

from tf_syncdist.transport.available import available_bytes

_TOKEN_BYTES = 16
# A page, so that blocks in a segment stay aligned.
_HEAD_BYTES = 4096
# Not in Python's fcntl: since Linux 5.1, no further writable mapping can be made.
_F_SEAL_FUTURE_WRITE = 0x10
# With these, what is in memory stays there: the file is not cut, and no hole is made in it.
_KEEP_SEALS = fcntl.F_SEAL_SHRINK | _F_SEAL_FUTURE_WRITE
_NAME = "tf_syncdist"


class SegmentError(RuntimeError):
    """Shared memory cannot be had."""


class Offer(NamedTuple):
    """What another process needs to open a segment.

    Args:
        pid: The creator.
        fd: Its file descriptor.
        size: Bytes that can be used.
        token: What stands at the segment's head, so that no other one is taken for it.
    """

    pid: int
    fd: int
    size: int
    token: bytes


class Segment:
    """Memory of a given size: created by one process, and read by those that open it.

    Use `create` or `open`.

    Attributes:
        data: The bytes as an array of uint8; writable for the creator.
    """

    def __init__(self, fd: int, mapping: mmap.mmap, offer: Offer) -> None:
        self.offer = offer
        self.data = np.frombuffer(mapping, np.uint8, offer.size, _HEAD_BYTES)
        self._fd = fd

    @classmethod
    def create(cls, size: int) -> "Segment":
        """Makes a segment; all of its memory is taken at once.

        Args:
            size: Number of bytes.

        Raises:
            SegmentError: If that much memory, or such memory at all, cannot be had.
        """
        if not sys.platform.startswith("linux"):
            raise SegmentError("shared memory needs Linux")
        # Asking for more than there is would make the system end processes, this one or others.
        available = available_bytes()
        if available is not None and size > available // 2:
            raise SegmentError(
                f"{size} bytes of shared memory cannot be had (more than half of the {available} "
                "that are available)"
            )
        fd = -1
        try:
            fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # Without this a machine without memory would answer a write by a fatal signal.
            os.posix_fallocate(fd, 0, _HEAD_BYTES + size)
            mapping = mmap.mmap(fd, _HEAD_BYTES + size)
            token = secrets.token_bytes(_TOKEN_BYTES)
            mapping[:_TOKEN_BYTES] = token
            fcntl.fcntl(
                fd,
                fcntl.F_ADD_SEALS,
                _KEEP_SEALS | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
            )
        except OSError as e:
            if fd >= 0:
                os.close(fd)
            raise SegmentError(f"{size} bytes of shared memory cannot be had ({e})") from e
        return cls(fd, mapping, Offer(os.getpid(), fd, size, token))

    @classmethod
    def open(cls, offer: Offer) -> "Segment":
        """Opens another process' segment to read it.

        Args:
            offer: What its creator says of it; nothing of it is believed.

        Raises:
            SegmentError: If it is not there, or not as it must be.
        """
        try:
            # Without waiting: what is taken for a segment may be a pipe.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", flags)
        except OSError as e:
            raise SegmentError(f"process {offer.pid}'s memory cannot be opened ({e})") from e
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if seals & _KEEP_SEALS != _KEEP_SEALS:
                raise SegmentError(f"process {offer.pid}'s memory could be shrunk")
            # Where there are holes, reading takes memory, and ends the reader if there is none.
            status = os.fstat(fd)
            if min(status.st_size, status.st_blocks * 512) < _HEAD_BYTES + offer.size:
                raise SegmentError(f"process {offer.pid}'s memory is smaller than it says")
            mapping = mmap.mmap(fd, _HEAD_BYTES + offer.size, prot=mmap.PROT_READ)
        except (OSError, ValueError, OverflowError) as e:
            raise SegmentError(f"process {offer.pid}'s memory cannot be read ({e})") from e
        finally:
            os.close(fd)
        if not secrets.compare_digest(mapping[:_TOKEN_BYTES], offer.token):
            raise SegmentError(f"process {offer.pid} is another one than expected")
        return cls(-1, mapping, offer)

    def close(self) -> None:
        """Lets nobody else open it. The memory itself goes with the last array that uses it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.data = self.data[:0]

    def __enter__(self) -> "Segment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def host_id() -> str:
    """Returns what is the same for processes that can share memory, "" if nothing can be said."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:
        return ""
