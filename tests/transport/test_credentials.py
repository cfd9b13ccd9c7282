"""Who is let in, over real sockets: TLS, certificates and the job's token."""

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from tf_syncdist.aggregation.server import AggregatorServer
from tf_syncdist.errors import AggregatorUnreachableError, CredentialsError, ServiceError
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.transport import wire
from tf_syncdist.transport.credentials import NO_CREDENTIALS, TOKEN_KEY, Credentials, read_token
from tf_syncdist.transport.guards import NO_TOKEN, UNKNOWN_METHOD

Serve = Callable[..., object]
FILES = Path(__file__).parents[1] / "certificates"
WAY = plan([TensorSpec("float32", (4,))], 100, 1)
TOKEN = "schön lang, mit Leerzeichen\n und Umbruch"
BEYOND = "192.0.2.7:5000"


def pem(name: str) -> str:
    """The path of a certificate or key."""
    return str(FILES / name)


def tls(name: str = "task", ca: str = "ca", token: str = "") -> Credentials:
    """The credentials of a task with one of the certificates; none without a name."""
    own = {"tls_cert": pem(f"{name}.pem"), "tls_key": pem(f"{name}.key")} if name else {}
    return Credentials(**own, tls_ca=pem(f"{ca}.pem") if ca else "", token=token)


def train(service: object, credentials: Credentials) -> None:
    """Two workers do a round."""
    sessions = [service.session(worker, credentials=credentials) for worker in range(2)]
    for session in sessions:
        session.send(0, 0, WAY, [np.ones(4, "f4")])
    for session in sessions:
        result = np.empty(4, "f4")
        assert session.receive(0, 0, WAY, [result]) == (1, 1)
        assert result.tolist() == [2.0] * 4


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    "server, worker",
    [
        (tls(token=TOKEN), tls(token=TOKEN)),
        (tls(), tls()),
        (tls(ca=""), tls("")),
        (Credentials(token=TOKEN), Credentials(token=TOKEN)),
        (NO_CREDENTIALS, Credentials(token=TOKEN)),
    ],
    ids=["mutual TLS and token", "mutual TLS", "TLS", "token", "unasked token"],
)
def test_who_has_what_is_demanded_trains(
    serve: Serve, server: Credentials, worker: Credentials, shares: bool
) -> None:
    service = serve(2, credentials=server, transport="auto" if shares else "grpc")
    train(service, worker)
    assert service.servers[0].refused == {}


@pytest.mark.parametrize(
    "server, worker, why",
    [
        (tls(), tls(ca="other_ca"), "CERTIFICATE_VERIFY_FAILED"),
        (tls(), NO_CREDENTIALS, ""),
        (NO_CREDENTIALS, tls(), "(?i)ssl|tls|handshake"),
        (tls("expired"), tls(), "CERTIFICATE_VERIFY_FAILED"),
        (tls("other_host"), tls(), "(?i)host|peer"),
        (tls("stranger"), tls(), "CERTIFICATE_VERIFY_FAILED"),
        (tls(), tls(""), ""),
        (tls(), tls("stranger"), ""),
        (tls(), tls("expired"), ""),
    ],
    ids=[
        "CA of another",
        "plain worker, TLS service",
        "TLS worker, plain service",
        "service's certificate has expired",
        "service's certificate is for another host",
        "service's certificate is by another CA",
        "no certificate",
        "certificate by another CA",
        "certificate has expired",
    ],
)
def test_who_cannot_be_trusted_does_not_get_through(
    serve: Serve, server: Credentials, worker: Credentials, why: str
) -> None:
    service = serve(2, credentials=server)
    # It cannot say why before it has been told.
    for seconds in (1.0, 15.0):
        with pytest.raises(AggregatorUnreachableError, match="same TLS options") as caught:
            service.session(0, credentials=worker, connect_timeout_seconds=seconds)
        if re.search(why, str(caught.value)):
            break
    assert caught.match(why)
    assert not service.events, "the job has heard nothing of it"
    if server in (tls(), NO_CREDENTIALS):
        train(service, server)


@pytest.mark.parametrize("shown", ["", "wrong", TOKEN[:-1], TOKEN + "x"])
def test_a_worker_without_the_token_is_refused_and_counted(serve: Serve, shown: str) -> None:
    service = serve(2, credentials=Credentials(token=TOKEN))
    with pytest.raises(ServiceError, match="UNAUTHENTICATED.*TF_SYNCDIST_TOKEN") as caught:
        service.session(0, credentials=Credentials(token=shown))
    assert TOKEN not in str(caught.value)
    train(service, Credentials(token=TOKEN))
    assert service.servers[0].refused == {NO_TOKEN: 1}
    assert sum(NO_TOKEN in event for event in service.events) == 1


METHODS = (wire.TRAIN, wire.REPORT, f"/{wire.SERVICE}/Nothing", "/grpc.health.v1.Health/Check")


@pytest.mark.parametrize("method", METHODS)
def test_every_call_is_checked_before_anything_is_read(serve: Serve, method: str) -> None:
    token = Credentials(token=TOKEN)
    service = serve(2, credentials=token)
    address = service.config.addresses[0]
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(20)
        yield b""

    with NO_CREDENTIALS.channel(address) as channel:
        for call in (
            lambda: list(channel.stream_stream(method)(nothing(), timeout=10)),
            lambda: channel.stream_unary(method)(nothing(), timeout=10),
            lambda: list(channel.unary_stream(method)(b"x" * 2**20, timeout=10)),
            lambda: channel.unary_unary(method)(b"x", timeout=10),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    over.set()
    twice = ((TOKEN_KEY, b"x"), (TOKEN_KEY, TOKEN.encode()))
    with NO_CREDENTIALS.channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(method)(b"", timeout=10, metadata=twice)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert service.servers[0].refused == {NO_TOKEN: 5}
    if method in METHODS[2:]:
        with token.channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert service.servers[0].refused == {NO_TOKEN: 5, UNKNOWN_METHOD: 1}


def test_a_report_says_what_was_refused(serve: Serve) -> None:
    token = Credentials(token=TOKEN)
    service = serve(1, credentials=token)
    with NO_CREDENTIALS.channel(service.config.addresses[0]) as channel:
        for _ in range(12):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(wire.REPORT)(b"", timeout=10)
    session = service.session(0, credentials=token)
    assert dict(session.report().refused) == {NO_TOKEN: 12}
    assert sum(NO_TOKEN in event for event in service.events) == 2, "the first and the tenth"


# What is given.


def test_the_environment_is_asked_for_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CERT", "KEY", "CA"):
        monkeypatch.delenv(f"TF_SYNCDIST_TLS_{name}", raising=False)
    monkeypatch.delenv("TF_SYNCDIST_TOKEN", raising=False)
    assert Credentials.from_environment() == NO_CREDENTIALS
    known = {
        "TF_SYNCDIST_TLS_CERT": "a",
        "TF_SYNCDIST_TLS_KEY": "b",
        "TF_SYNCDIST_TLS_CA": "c",
        "TF_SYNCDIST_TOKEN": "d",
    }
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    found = Credentials.from_environment()
    assert found == Credentials("a", "b", "c", "d")
    assert found.variables() == known
    given = Credentials.from_environment(tls_cert="x", token="", insecure=True)
    assert given == Credentials("x", "b", "c", "", True)
    assert given.variables()["TF_SYNCDIST_TOKEN"] == "", "a child is told that there is none"


def test_a_token_does_not_show_itself() -> None:
    assert "secret" not in repr(Credentials(token="secret")) + str(Credentials(token="secret"))


def test_a_token_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret\n")
    assert read_token(str(path)) == "secret"
    path.write_text("\n")
    with pytest.raises(CredentialsError, match="is empty"):
        read_token(str(path))
    with pytest.raises(CredentialsError, match="No such file"):
        read_token(str(tmp_path / "none"))
    with pytest.raises(CredentialsError, match="at most 1024 bytes"):
        Credentials(token="x" * 1025).check()


@pytest.mark.parametrize(
    "credentials, named",
    [
        (Credentials(tls_cert=pem("task.pem"), tls_ca=pem("ca.pem")), ["tls_key=''", "Give both"]),
        (Credentials(tls_key=pem("task.key"), tls_ca=pem("ca.pem")), ["tls_cert=''", "Give both"]),
        (Credentials(tls_ca="/none/ca.pem"), ["tls_ca='/none/ca.pem'", "TF_SYNCDIST_TLS_CA"]),
        (
            Credentials(pem("task.pem"), pem("stranger.key"), pem("ca.pem")),
            ["stranger.key", "MISMATCH"],
        ),
        (Credentials(pem("README.md"), pem("task.key"), pem("ca.pem")), ["README.md", "PEM"]),
        (Credentials(tls_ca=pem("README.md")), ["README.md", "certificates as PEM"]),
    ],
    ids=range(6),
)
def test_files_that_cannot_be_used_are_named(credentials: Credentials, named: list[str]) -> None:
    for use in (credentials.check, lambda: credentials.channel("127.0.0.1:5000")):
        with pytest.raises(CredentialsError) as caught:
            use()
        assert all(part in str(caught.value) for part in named), caught.value


def test_a_side_lacks_what_it_needs() -> None:
    with pytest.raises(CredentialsError, match="CA that has signed"):
        tls(ca="").channel("127.0.0.1:5000")
    with pytest.raises(CredentialsError, match="certificate and its private key"):
        AggregatorServer(credentials=tls(""))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the key is made by openssl")
def test_a_key_with_a_password_is_refused_without_asking(tmp_path: Path) -> None:
    path = tmp_path / "key"
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", pem("task.key"), "-out", path],
        check=True,
        capture_output=True,
        timeout=20,
    )
    with pytest.raises(CredentialsError, match="without a password"):
        Credentials(pem("task.pem"), str(path), pem("ca.pem")).check()


def test_nothing_is_exposed_unless_it_is_typed() -> None:
    for credentials in (NO_CREDENTIALS, Credentials(token=TOKEN)):
        with pytest.raises(CredentialsError, match="--insecure") as caught:
            AggregatorServer("0.0.0.0", credentials=credentials)
        assert ("its token" in str(caught.value)) == bool(credentials.token)
    with pytest.raises(CredentialsError, match="plain text.*tls_ca.*insecure=True"):
        Credentials(token=TOKEN).channel(BEYOND)
    for credentials in (NO_CREDENTIALS, Credentials(token=TOKEN, insecure=True), tls(token=TOKEN)):
        credentials.channel(BEYOND).close()
    for credentials in (Credentials(token=TOKEN, insecure=True), tls(token=TOKEN)):
        with AggregatorServer("0.0.0.0", credentials=credentials) as server:
            address = f"127.0.0.1:{server.port}"
            with credentials.channel(address) as channel:
                assert channel.unary_unary(wire.REPORT)(b"", timeout=10) == b""
