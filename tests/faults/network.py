"""A machine of its own for a worker: a network namespace at the other end of a cable."""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence

# Of the networks that are set aside for tests of equipment.
_NETWORK = "198.18"
_SECONDS = 20.0


def why_not() -> str:
    """Returns why network namespaces cannot be made here, or nothing."""
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    if shutil.which("ip") is None:
        return "there is no `ip` (package iproute2)"
    name = f"tfsd{uuid.uuid4().hex[:8]}"
    try:
        _ip("netns", "add", name)
    except RuntimeError as e:
        return f"network namespaces cannot be made here: {e}"
    _ip("netns", "delete", name)
    return ""


class Machine:
    """A namespace with one interface, and a cable to this one that can be pulled.

    Attributes:
        address: The IP address by which its processes reach those of this namespace.
        prefix: What is put in front of a command to run it there.
    """

    def __init__(self) -> None:
        self._name = f"tfsd{uuid.uuid4().hex[:8]}"
        self._is_closed = False
        number = int(self._name[4:], 16) % (2**14)
        network = f"{_NETWORK}.{number >> 6}.{(number & 63) * 4}".rpartition(".")
        first = int(network[2])
        self.address = f"{network[0]}.{first + 1}"
        self.prefix = ("ip", "netns", "exec", self._name)
        ours, theirs = f"{self._name}a", f"{self._name}b"
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
            _ip("link", "set", theirs, "netns", self._name)
            _ip("address", "add", f"{self.address}/30", "dev", ours)
            _ip("link", "set", ours, "up")
            there = ("-n", self._name)
            _ip(*there, "address", "add", f"{network[0]}.{first + 2}/30", "dev", theirs)
            _ip(*there, "link", "set", theirs, "up")
            _ip(*there, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Pulls the cable: packets are lost both ways, and nobody is told."""
        _ip("-n", self._name, "link", "set", f"{self._name}b", "down")

    def heal(self) -> None:
        """Puts the cable in again."""
        _ip("-n", self._name, "link", "set", f"{self._name}b", "up")

    def close(self) -> None:
        """Removes it. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            for arguments in (
                ("link", "delete", f"{self._name}a"),
                ("netns", "delete", self._name),
            ):
                with contextlib.suppress(RuntimeError):
                    _ip(*arguments)


def _ip(*arguments: str) -> None:
    command: Sequence[str] = ("ip", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
