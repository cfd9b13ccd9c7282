"""Links of limited bandwidth on one machine: network namespaces, each with a cable to this one.

Needs root, `ip` and `tc` (package iproute2). A token bucket stands at either end of a cable, so a
link is full duplex, and processes in two namespaces do not share a link.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from concurrent import futures

# Of the networks that are set aside for tests of equipment.
_NETWORK = "198.18"
_COMMAND_SECONDS = 20.0
# Jumbo frames, as within a cluster: their headers take 1 % of the link, those of others 5 %.
_MTU = 9000
# What may leave at once. The kernel hands over packets of up to 64 kB.
_BURST_BYTES = 64 * 1024
# What waits in front of the bucket. Small, since nothing can overtake there; a socket has less on
# its way by itself as long as nobody else uses the link.
_QUEUE_BYTES = 512 * 1024

# Sends and receives at once for a while, and prints how many bytes came in per second.
_PROBE = """
import socket, sys, threading, time
address, seconds = sys.argv[1], float(sys.argv[2])
block = bytes(1 << 18)
def send(sock):
    try:
        while True:
            sock.sendall(block)
    except OSError:
        pass
def rate(sock):
    view = memoryview(bytearray(1 << 18))
    counts, begin = [(time.monotonic(), 0)], time.monotonic()
    try:
        while time.monotonic() < begin + seconds and (got := sock.recv_into(view)):
            counts.append((time.monotonic(), counts[-1][1] + got))
    except OSError:
        pass  # The other end was ready first.
    # The first part of the time fills buffers.
    first = next((c for c in counts if c[0] > begin + seconds / 4), counts[0])
    return (counts[-1][1] - first[1]) / max(counts[-1][0] - first[0], 1e-9)
if address:
    sock = socket.create_connection((address, int(sys.argv[3])), 10)
else:
    server = socket.create_server(("0.0.0.0", 0))
    server.settimeout(10)
    print(server.getsockname()[1], flush=True)
    sock = server.accept()[0]
sock.settimeout(10)
threading.Thread(target=send, args=(sock,), daemon=True).start()
print(rate(sock), flush=True)
"""


def why_not() -> str:
    """Returns why links cannot be limited here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"there is no `{program}` (package iproute2)"
    try:
        with Link() as link:
            link.limit(1.0)
    except RuntimeError as error:
        return f"links cannot be limited here: {error}"
    return ""


class Link:
    """A namespace with one interface, and a cable from there to this machine.

    Attributes:
        address: The IP address by which its processes reach those of this machine's namespace,
            and by which those of other links do.
        prefix: What is put in front of a command to run it there.
    """

    def __init__(self) -> None:
        self._name = f"tfsd{uuid.uuid4().hex[:8]}"
        self._is_closed = False
        number = int(self._name[4:], 16) % (2**14)
        network, first = f"{_NETWORK}.{number >> 6}", (number & 63) * 4
        self.address = f"{network}.{first + 1}"
        self.prefix = ("ip", "netns", "exec", self._name)
        self._ours, self._theirs = f"{self._name}a", f"{self._name}b"
        ours, theirs, there = self._ours, self._theirs, ("-n", self._name)
        try:
            _run("ip", "netns", "add", self._name)
            _run("ip", "link", "add", ours, "mtu", str(_MTU), "type", "veth", "peer", theirs)
            _run("ip", "link", "set", theirs, "mtu", str(_MTU), "netns", self._name)
            _run("ip", "address", "add", f"{self.address}/30", "dev", ours)
            _run("ip", "link", "set", ours, "up")
            _run("ip", *there, "address", "add", f"{network}.{first + 2}/30", "dev", theirs)
            _run("ip", *there, "link", "set", theirs, "up")
            _run("ip", *there, "link", "set", "lo", "up")
            # The service has one address, which is at the end of another link's cable.
            _run("ip", *there, "route", "add", "default", "via", self.address)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def limit(self, gbps: float) -> None:
        """Sets the bandwidth of either direction in 10^9 bits per second; 0 is without limit."""
        for namespace, device in (((), self._ours), (("-n", self._name), self._theirs)):
            command = ("tc", *namespace, "qdisc")
            if gbps:
                bucket = ("tbf", "rate", f"{round(gbps * 1e9)}bit", "burst", str(_BURST_BYTES))
                bucket = (*bucket, "limit", str(_QUEUE_BYTES))
                _run(*command, "replace", "dev", device, "root", *bucket)
            else:
                # There is none to delete where there has been no limit.
                with contextlib.suppress(RuntimeError):
                    _run(*command, "delete", "dev", device, "root")

    def measure(self, seconds: float) -> tuple[float, float]:
        """Sends plain bytes through one TCP connection, both ways at once.

        Args:
            seconds: For how long.

        Returns:
            10^9 bits per second from the namespace and into it.

        Raises:
            RuntimeError: If nothing arrives.
        """
        with contextlib.ExitStack() as stack:
            here = _start_probe(stack, (), "", seconds)
            port = here.stdout.readline().strip()
            there = _start_probe(stack, self.prefix, self.address, seconds, port)
            timeout = seconds + _COMMAND_SECONDS
            out: list[str] = []
            try:
                out += [process.communicate(timeout=timeout)[0] for process in (here, there)]
                return float(out[0]) * 8e-9, float(out[1]) * 8e-9
            except (ValueError, subprocess.TimeoutExpired) as error:
                raise RuntimeError(f"No plain TCP transfer over the link: {out}.") from error

    def close(self) -> None:
        """Removes it. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            for arguments in (("link", "delete", self._ours), ("netns", "delete", self._name)):
                with contextlib.suppress(RuntimeError):
                    _run("ip", *arguments)


class Network:
    """The links of several workers, which have the same bandwidth.

    Args:
        num_links: How many; none if something else limits the workers.

    Attributes:
        cables: The links.
        measured: What plain TCP connections moved over all links at once, by the bandwidth: the
            least of all links and directions. Both in 10^9 bits per second.
    """

    def __init__(self, num_links: int) -> None:
        self.cables: list[Link] = []
        self.measured: dict[float, float] = {}
        try:
            for _ in range(num_links):
                self.cables.append(Link())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes all links. May be called twice."""
        for cable in self.cables:
            cable.close()

    def limit(self, gbps: float) -> None:
        """Sets the bandwidth of every link; see `Link.limit`."""
        for cable in self.cables:
            cable.limit(gbps)

    def measure(self, gbps: float, seconds: float) -> None:
        """Notes what the links move at a bandwidth, unless that is known or without limit.

        Args:
            gbps: The bandwidth.
            seconds: For how long.

        Raises:
            RuntimeError: If nothing arrives.
        """
        if not gbps or gbps in self.measured or not self.cables:
            return
        self.limit(gbps)
        with futures.ThreadPoolExecutor(len(self.cables)) as pool:
            # At once, as the workers use them.
            rates = list(pool.map(lambda cable: cable.measure(seconds), self.cables))
        self.measured[gbps] = min(min(pair) for pair in rates)


def _start_probe(
    stack: contextlib.ExitStack,
    prefix: tuple[str, ...],
    address: str,
    seconds: float,
    port: str = "",
) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", _PROBE, address, str(seconds), port]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait, _COMMAND_SECONDS)
    stack.callback(process.kill)
    return process


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
