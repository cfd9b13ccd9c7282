"""The aggregation service as a process."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tf_syncdist import cutoff
from tf_syncdist.cluster import child
from tf_syncdist.cluster.addresses import is_loopback
from tf_syncdist.cluster.child import ChildAggregator
from tf_syncdist.cluster.ports import reserve_ports
from tf_syncdist.cluster.roles import ClusterRole
from tf_syncdist.errors import AggregatorUnreachableError, ClusterConfigError, ServiceError
from tf_syncdist.proto import tf_syncdist_pb2 as pb
from tf_syncdist.transport.credentials import NO_CREDENTIALS, Credentials
from tf_syncdist.transport.session import Session, SessionConfig


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which nobody listens, and which no connection and no launcher takes meanwhile."""
    with reserve_ports(1) as (reserved,):
        reserved.release()
        yield reserved.port


def can_connect(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with contextlib.closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def until_free(port: int, seconds: float = 45.0) -> None:
    """Waits until nobody listens on a port any more."""
    deadline = time.monotonic() + seconds
    while can_connect(port):
        assert time.monotonic() < deadline, f"somebody still listens on port {port}"
        time.sleep(0.02)


def join(
    port: int, num_workers: int = 1, worker: int = 0, credentials: Credentials = NO_CREDENTIALS
) -> Session:
    """Opens the session of a worker."""
    policy = cutoff.serialize(cutoff.FullSync())
    config = SessionConfig(
        (f"127.0.0.1:{port}",), worker, num_workers, policy, credentials=credentials
    )
    return Session(config._replace(timeout_seconds=30, detection_seconds=30), print)


@contextlib.contextmanager
def aggregator(*args: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Starts the service as a user would; yields the process and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tf_syncdist.aggregator", "--port=0", *args],
        env=child.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"tf_syncdist aggregator listening on 127\.0\.0\.1:(\d+)\n", line)
        assert found, line + process.stdout.read()
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def refusal(*args: str, **variables: str) -> list[str]:
    """Returns what the service prints when it does not start."""
    result = subprocess.run(
        [sys.executable, "-m", "tf_syncdist.aggregator", *args],
        env=child.environment(variables),
        capture_output=True,
        timeout=90,
        text=True,
    )
    assert result.returncode == 1
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr.splitlines()


def test_the_service_starts_quickly_and_small_and_without_tensorflow() -> None:
    """A second and 60 MB where nothing else runs; the limits here leave room for a busy machine.

    The second is nearly all computing, of which there is not more on a machine that is busy.
    """
    with aggregator() as (process, port):
        with contextlib.closing(join(port)) as session:
            assert session.report().rounds == 0
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            assert sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") < 5
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            status = Path(f"/proc/{process.pid}/status").read_text()
        assert "grpc" in maps and "numpy" in maps
        assert "tensorflow" not in maps and "keras" not in maps
        assert int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) < 150_000


def seconds_to_end(number: signal.Signals, connected: bool) -> float:
    """Returns how long a service took to end after a signal."""
    with aggregator() as (process, port):
        session = join(port) if connected else None
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(45) == 0
        seconds = time.monotonic() - started
        assert "Traceback" not in process.stdout.read()
        if session is not None:
            session.close()
            assert session.has_failed
    return seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("connected", [False, True])
def test_the_service_ends_soon_after_a_signal(number: signal.Signals, connected: bool) -> None:
    # It takes half a second where nothing holds it up, which a busy machine may do at times.
    assert any(seconds_to_end(number, connected) < 4 for _ in range(3))


def test_the_service_ends_with_its_job_and_says_who_came_and_went() -> None:
    with aggregator() as (process, port):
        first, second = join(port, 2), join(port, 2, 1)
        second.close()
        first.goodbye(pb.FINISHED, 7)
        assert first.wait_all_gone(45, lambda: None)
        first.close()
        assert process.wait(45) == 0
        lines = process.stdout.read().splitlines()
        assert all(line.startswith("tf_syncdist aggregator: ") for line in lines)
        text = "\n".join(lines)
        for part in ("worker 0 joined", "worker 1 joined (2 of 2)", "worker 1 is gone"):
            assert part in text
        assert "worker 0 left after 7 run(s): finished" in text


def test_the_service_gives_up_after_its_time() -> None:
    with aggregator("--max_seconds=0.3") as (process, _):
        assert process.wait(45) == 0


@pytest.mark.parametrize(
    "host, named", [("0.0.0.0", ["0.0.0.0", "--insecure", "127.0.0.1"]), ("192.0.2.7", ["192.0"])]
)
def test_an_address_beyond_loopback_is_refused_in_one_line(host: str, named: list[str]) -> None:
    (line,) = refusal(f"--host={host}")
    assert all(part in line for part in ("tf_syncdist aggregator: Expected", *named))


def test_an_address_that_cannot_be_had_is_refused() -> None:
    """The last line is ours; gRPC prints some before it."""
    assert "192.0.2.7:0, which cannot" in refusal("--host=192.0.2.7", "--insecure")[-1]
    with aggregator() as (_, port):
        assert f"127.0.0.1:{port}, which cannot" in refusal(f"--port={port}")[-1]


def test_a_child_serves_until_it_is_closed(port: int) -> None:
    with ChildAggregator(f"127.0.0.1:{port}", insecure=False) as service:
        with contextlib.closing(join(port, 2)) as session:
            assert session.report().rounds == 0
        assert can_connect(port)
    assert not can_connect(port)
    service.close()
    with ChildAggregator(f"localhost:{port}", insecure=False):
        assert can_connect(port), "the port can be used again at once"


def test_a_child_ends_when_its_parent_is_killed(port: int) -> None:
    """Even while another child of the parent lives on."""
    code = f"""
        import subprocess, time
        from tf_syncdist.cluster.child import ChildAggregator
        service = ChildAggregator("127.0.0.1:{port}", insecure=False)
        other = subprocess.Popen(["sleep", "250"])
        print(other.pid, flush=True)
        time.sleep(250)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=child.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        other = int(parent.stdout.readline())
        try:
            assert can_connect(port)
            parent.kill()
            parent.wait(10)
            until_free(port)
        finally:
            os.kill(other, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()


def test_a_port_in_use_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(AggregatorUnreachableError, match=f"{address}.*exit code 1.*in use"):
            ChildAggregator(address, insecure=False)


def test_a_child_that_does_not_start_in_time_is_ended(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    # The service itself may start in any time, if this process is held up meanwhile.
    code = f"""
        import socket, sys
        server = socket.create_server(("127.0.0.1", {port}))
        open(int(sys.argv[1].removeprefix("--parent_fd="))).read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    monkeypatch.setattr(child, "command", lambda *_: command)
    with pytest.raises(AggregatorUnreachableError, match="within 0.5 s"):
        ChildAggregator(f"127.0.0.1:{port}", insecure=False, timeout_seconds=0.5)
    assert not can_connect(port)


@pytest.mark.parametrize("address", ["0.0.0.0:5000", "192.0.2.7:5000", "[2001:db8::1]:5000"])
def test_an_address_beyond_loopback_has_to_be_allowed(address: str) -> None:
    with pytest.raises(ClusterConfigError, match="insecure=True") as error:
        ChildAggregator(address, insecure=False)
    assert repr(address) in str(error.value)
    with pytest.raises(ClusterConfigError):
        child.become_aggregator(ClusterRole("ps", 0, ("a:1", "b:1"), (address,)), insecure=False)
    command = child.command(address, insecure=True)
    assert {"--port=5000", "--insecure"} <= set(command)
    command = child.command(address, insecure=False, tls=True)
    assert {"--port=5000", "--host=0.0.0.0"} <= set(command) and "--insecure" not in command


@pytest.mark.parametrize(
    "address, host",
    [("127.0.0.1:7", "127.0.0.1"), ("localhost:7", "127.0.0.1"), ("[::1]:7", "::1")],
)
def test_loopback_addresses_are_served_as_they_are(address: str, host: str) -> None:
    command = child.command(address, insecure=False)
    assert {"--port=7", f"--host={host}"} <= set(command) and "--insecure" not in command
    assert command == child.command(address, insecure=True)
    recording = child.command(address, insecure=True, record_trace="/tmp/trace.npz")
    assert set(recording) - set(command) == {"--record_trace=/tmp/trace.npz"}


@pytest.mark.parametrize(
    "host, expected",
    [
        ("127.0.0.1", True),
        ("127.9.8.7", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("no such host", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


CERTIFICATES = Path(__file__).parents[1] / "certificates"
SECRET = "a-secret-that-must-not-show"
OURS = Credentials(
    *(str(CERTIFICATES / name) for name in ("task.pem", "task.key", "ca.pem")), token=SECRET
)


def check_protected(pid: int, port: int) -> None:
    """Checks that a service demands what `OURS` has, and does not show the token to others."""
    with contextlib.closing(join(port, 2, 0, OURS)) as session:
        assert session.report().rounds == 0
    with pytest.raises(ServiceError, match="UNAUTHENTICATED"):
        join(port, 2, 1, dataclasses.replace(OURS, token="x"))
    with pytest.raises(AggregatorUnreachableError):
        Session(SessionConfig((f"127.0.0.1:{port}",), 1, 2, "", connect_timeout_seconds=0.5), print)
    assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_child_is_told_the_credentials_but_not_on_its_command_line(port: int) -> None:
    tls, variables = OURS.uses_tls, OURS.variables()
    with ChildAggregator(f"127.0.0.1:{port}", False, tls=tls, variables=variables) as service:
        check_protected(service._process.pid, port)  # noqa: SLF001
    assert "TF_SYNCDIST_TOKEN" not in os.environ


def test_the_service_takes_credentials_from_flags(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(SECRET + "\n")
    own = [f"--tls_cert={OURS.tls_cert}", f"--tls_key={OURS.tls_key}", f"--tls_ca={OURS.tls_ca}"]
    with aggregator(*own, f"--token_file={token}") as (process, port):
        check_protected(process.pid, port)


def test_flags_of_the_service_beat_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**OURS.variables(), "TF_SYNCDIST_TLS_CERT": "/none"}.items():
        monkeypatch.setenv(name, value)
    with aggregator(f"--tls_cert={OURS.tls_cert}") as (process, port):
        check_protected(process.pid, port)
    (line,) = refusal()
    assert "tls_cert='/none'" in line and "TF_SYNCDIST_TLS_CERT" in line and SECRET not in line
    (line,) = refusal(f"--token_file={tmp_path / 'none'}")
    assert "Expected a file with the job's token" in line
