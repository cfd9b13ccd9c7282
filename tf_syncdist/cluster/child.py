"""The aggregation service as a process: a child of worker 0, or in place of a `ps` task."""

import os
import pathlib
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from tf_syncdist.cluster.addresses import is_loopback
from tf_syncdist.cluster.roles import ClusterRole
from tf_syncdist.cluster.service_environment import service_environment
from tf_syncdist.errors import AggregatorUnreachableError, ClusterConfigError

_ANY = "0.0.0.0"


def command(address: str, insecure: bool, tls: bool = False, record_trace: str = "") -> list[str]:
    """Returns the command that serves at an address of the cluster.

    Args:
        address: "host:port" as the cluster names it.
        insecure: Whether an address beyond loopback may be served without TLS.
        tls: Whether it is served with TLS, as the environment says.
        record_trace: File for how long workers take; empty for none.

    Raises:
        ClusterConfigError: If the address is beyond loopback and neither TLS nor `insecure` is
            set.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    args = [sys.executable, "-m", "tf_syncdist.aggregator", f"--port={port}"]
    if record_trace:
        args.append(f"--record_trace={record_trace}")
    if is_loopback(host):
        return [*args, f"--host={'127.0.0.1' if host == 'localhost' else host}"]
    # A cluster's name for a machine (a Kubernetes service, say) need not be an interface of it.
    args.append(f"--host={_ANY}")
    if tls:
        return args
    if not insecure:
        raise ClusterConfigError(
            "Expected the aggregation service at a loopback address, because without TLS anybody "
            f"who reaches the port could take part in the job. Received: {address!r}. Give "
            "certificates (`tls_cert`, `tls_key` and `tls_ca`; see docs/security.md), or pass "
            "`insecure=True` on a network that you trust."
        )
    return [*args, "--insecure"]


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment in which `python -m tf_syncdist...` finds this very package.

    Args:
        variables: Added to that of this process: its credentials, which must not stand on a
            command line, where every user of the machine can read them.
    """
    env = {**os.environ, **(variables or {})}
    root = str(pathlib.Path(__file__).resolve().parents[2])
    paths = [root, *env.get("PYTHONPATH", "").split(os.pathsep)]
    env["PYTHONPATH"] = os.pathsep.join(p for p in dict.fromkeys(paths) if p)
    return service_environment(env)


def become_aggregator(
    role: ClusterRole,
    insecure: bool,
    *,
    tls: bool = False,
    variables: Mapping[str, str] | None = None,
    record_trace: str = "",
) -> NoReturn:
    """Replaces this process, with TensorFlow and all, by the service. Does not return.

    Args:
        role: The role of this process.
        insecure: See `command`.
        tls: See `command`.
        variables: See `environment`.
        record_trace: See `command`.
    """
    if role.num_workers == 1:
        print("tf_syncdist: a single worker needs no aggregation service", flush=True)
        sys.exit(0)
    args = command(role.address, insecure, tls, record_trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(args[0], args, environment(variables))


class ChildAggregator:
    """The service as a child of this process; it ends when this process does, however that ends.

    Args:
        address: "host:port" to serve at.
        insecure: See `command`.
        timeout_seconds: How long to wait until it serves.
        tls: See `command`.
        variables: See `environment`.
        record_trace: See `command`.

    Raises:
        AggregatorUnreachableError: If it does not serve in time.
    """

    def __init__(
        self,
        address: str,
        insecure: bool,
        timeout_seconds: float = 30.0,
        *,
        tls: bool = False,
        variables: Mapping[str, str] | None = None,
        record_trace: str = "",
    ) -> None:
        args = command(address, insecure, tls, record_trace)
        # The pipe's end of file tells the child that its parent is gone, even by SIGKILL.
        read_end, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*args, f"--parent_fd={read_end}", "--quiet"],
                env=environment(variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=[read_end],
                start_new_session=True,
            )
        finally:
            os.close(read_end)
        try:
            line = self._first_line(time.monotonic() + timeout_seconds)
        except BaseException:
            self.close()
            raise
        if b"listening" not in line:
            self.close()
            raise AggregatorUnreachableError(
                f"Expected the aggregation service to start at {address} within "
                f"{timeout_seconds:g} s. Received: exit code {self._process.returncode}. Is the "
                "port in use, or left over from another job? It has said why above."
            )

    def ended(self) -> int | None:
        """Returns its exit code, or `None` while it runs."""
        return self._process.poll()

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Ends the service. May be called twice."""
        if self._lifeline < 0:
            return
        os.close(self._lifeline)
        self._lifeline = -1
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout_seconds)
        self._process.stdout.close()

    def __enter__(self) -> "ChildAggregator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _first_line(self, deadline: float) -> bytes:
        line, fd = b"", self._process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(fd, 1024) if ready else b""
            if not piece:
                break
            line += piece
        return line
