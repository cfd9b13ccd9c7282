"""How much memory may be taken before the system ends a process for it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

_CGROUP_FILES = (
    ("/sys/fs/cgroup", "", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_bytes() -> int | None:
    """Returns how many bytes the machine and this process' container have left.

    Returns:
        A number of bytes; `None` if the system does not tell.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    found.extend(_left_in_cgroups())
    return min(found, default=None)


def _left_in_cgroups() -> Iterator[int]:
    paths = {"": "/", "memory": "/"}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for name in controllers.split(","):
                paths[name] = path
    for mount, controller, limit, usage in _CGROUP_FILES:
        # A container often sees its own group at the mount point.
        for root in {Path(mount), Path(mount + paths[controller])}:
            # "max" is no number.
            with contextlib.suppress(OSError, ValueError):
                yield int((root / limit).read_text()) - int((root / usage).read_text())
