"""Free ports for the tasks of a job on this machine."""

import contextlib
import errno
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_FIRST_PORT = 20_000
_LAST_PORT = 29_999
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class ReservedPort:
    """A port that no other launcher on this machine picks while it is reserved.

    A task needs seconds from its start until it listens, and its port must not be picked by
    another launcher meanwhile. So two sockets guard it: a TCP socket, which shows that nobody
    listens there and is let go just before the task starts, and a UDP socket of the same number,
    which does not stand in the task's way and is therefore kept for as long as the job lives.

    Args:
        port: The port to reserve, on all addresses of this machine.

    Raises:
        OSError: If the port is taken.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        with contextlib.ExitStack() as on_failure:
            self._token = on_failure.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._token.bind(("127.0.0.1", port))
            # No SO_REUSEADDR: with it, two sockets that do not listen yet could share the port.
            self._holder = on_failure.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            )
            self._holder.bind(("0.0.0.0", port))
            on_failure.pop_all()

    def release(self) -> None:
        """Lets a task bind the port; other launchers still keep off it."""
        self._holder.close()

    def close(self) -> None:
        """Gives the port up altogether."""
        self._holder.close()
        self._token.close()


@contextlib.contextmanager
def reserve_ports(count: int) -> Iterator[list[ReservedPort]]:
    """Reserves free ports, below the range from which outgoing connections take theirs.

    Args:
        count: How many ports.

    Yields:
        The reserved ports, all distinct. They are given up when the context ends.

    Raises:
        OSError: If there are not enough free ports.
    """
    candidates = _candidates()
    # SystemRandom, so that launchers started at once do not try the same ports in the same order.
    order = random.SystemRandom().sample(candidates, len(candidates))
    with contextlib.ExitStack() as stack:
        reserved: list[ReservedPort] = []
        for port in order:
            if len(reserved) == count:
                break
            with contextlib.suppress(OSError):
                reserved.append(ReservedPort(port))
                stack.callback(reserved[-1].close)
        if len(reserved) < count:
            raise OSError(
                errno.EADDRINUSE,
                f"Expected {count} free ports between {candidates[0]} and {candidates[-1]}. "
                f"Received: {len(reserved)} free ports. End other programs that listen there, or "
                "start fewer tasks.",
            )
        yield reserved


def _candidates() -> range:
    try:
        ephemeral_from = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        ephemeral_from = _LAST_PORT + 1
    last = min(_LAST_PORT, ephemeral_from - 1)
    # Where nearly all ports are ephemeral there is no safe range; the reservation has to do.
    return range(_FIRST_PORT, (last if last >= _FIRST_PORT + 1_000 else _LAST_PORT) + 1)
