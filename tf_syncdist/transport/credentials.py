"""Who may talk to whom: TLS and the job's token, for every channel and every port."""

import dataclasses
import hmac
import os
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc

from tf_syncdist.cluster.addresses import is_loopback
from tf_syncdist.errors import CredentialsError
from tf_syncdist.transport import wire

# A key that ends in -bin carries any bytes, so a token may have any characters.
TOKEN_KEY = "tf-syncdist-token-bin"

_VARIABLES = {
    "tls_cert": "TF_SYNCDIST_TLS_CERT",
    "tls_key": "TF_SYNCDIST_TLS_KEY",
    "tls_ca": "TF_SYNCDIST_TLS_CA",
    "token": "TF_SYNCDIST_TOKEN",
}
# Everything is sent in the headers of each call, which gRPC limits to 8 KiB.
_MOST_TOKEN_BYTES = 1024

ChannelOptions = Sequence[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Credentials:
    """What a process shows to others of its job, and what it demands of them.

    A process that serves needs `tls_cert` and `tls_key` for TLS. With `tls_ca` it also demands a
    certificate of every client that this CA has signed (mutual TLS). A process that connects
    needs `tls_ca`, by which it verifies the service's certificate for the host name that it
    connects to; it shows its own certificate if it has one. Without any of the three there is no
    TLS. Files are read when a channel or a port is made.

    Args:
        tls_cert: Path of this process' certificate as PEM, with intermediate ones after it.
        tls_key: Path of its private key as PEM, without a password.
        tls_ca: Path of the certificates as PEM that others' certificates must be signed by.
        token: The job's token, a secret that all processes of the job are given. It is the secret
            itself; `read_token` reads it from a file.
        insecure: Whether addresses beyond loopback are allowed without TLS, and the token to
            travel there in plain text. Set it only on a network that you trust.

    Example:

    >>> credentials = Credentials.from_environment(token="a long secret")
    >>> with credentials.channel("127.0.0.1:5000") as channel:
    ...     pass
    """

    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    token: str = dataclasses.field(default="", repr=False)
    insecure: bool = False

    @classmethod
    def from_environment(
        cls,
        *,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        token: str | None = None,
        insecure: bool = False,
    ) -> "Credentials":
        """Returns what is given and, where `None` is given, what the environment says.

        The variables are TF_SYNCDIST_TLS_CERT, TF_SYNCDIST_TLS_KEY, TF_SYNCDIST_TLS_CA and
        TF_SYNCDIST_TOKEN; an empty one, and an empty argument, stand for nothing.

        Args:
            tls_cert: See the class.
            tls_key: See the class.
            tls_ca: See the class.
            token: See the class.
            insecure: See the class; not in the environment, since it has to be typed.
        """
        given = {"tls_cert": tls_cert, "tls_key": tls_key, "tls_ca": tls_ca, "token": token}
        for name, value in given.items():
            if value is None:
                given[name] = os.environ.get(_VARIABLES[name], "")
        return cls(**{name: os.fspath(value) for name, value in given.items()}, insecure=insecure)

    @property
    def uses_tls(self) -> bool:
        """Whether channels and ports are encrypted."""
        return bool(self.tls_cert or self.tls_key or self.tls_ca)

    def variables(self) -> dict[str, str]:
        """Returns environment variables from which another process gets the same credentials."""
        # Empty ones too: what this process was told explicitly also holds for its children.
        return {variable: getattr(self, name) for name, variable in _VARIABLES.items()}

    def channel(self, address: str, options: ChannelOptions = wire.CHANNEL_OPTIONS) -> grpc.Channel:
        """Makes a channel that shows and demands what it should, and sends the token in each call.

        Args:
            address: "host:port"; with TLS the server's certificate must be for this host.
            options: gRPC's options of the channel.

        Raises:
            CredentialsError: If a file cannot be used, or the token would travel in plain text.
        """
        host = address.rpartition(":")[0].strip("[]")
        if self.uses_tls:
            files = self._files(serves=False)
            channel = grpc.secure_channel(
                address, grpc.ssl_channel_credentials(files.ca, files.key, files.cert), options
            )
        else:
            if self.token and not self.insecure and not is_loopback(host):
                raise CredentialsError(
                    "Expected TLS where the job's token travels beyond this machine, because in "
                    "plain text everybody on the way can read it. Received: a token for "
                    f"{address!r} without `tls_ca`. Give `tls_ca` (TF_SYNCDIST_TLS_CA), or "
                    "`insecure=True` on a network that you trust."
                )
            channel = grpc.insecure_channel(address, options)
        return grpc.intercept_channel(channel, _AddToken(self._token())) if self.token else channel

    def add_port(self, server: grpc.Server, host: str, port: int) -> int:
        """Lets a server listen at an address, with TLS if there is a certificate.

        The server also needs a `guards.CallGuard`, which checks the token.

        Args:
            server: The server.
            host: Address to listen on.
            port: Port to listen on; 0 for a free one.

        Returns:
            The port.

        Raises:
            CredentialsError: If a file cannot be used, or the address is beyond loopback and there
                is neither TLS nor `insecure`.
            OSError: If the port cannot be had.
        """
        self._token()
        if not (self.uses_tls or self.insecure or is_loopback(host)):
            exposed = ", and everybody on the way could read its token" if self.token else ""
            raise CredentialsError(
                "Expected a loopback address, because without TLS anybody who reaches the port "
                f"could take part in the job{exposed}. Received: host={host!r}. Use 127.0.0.1, "
                "give a certificate and its key (--tls_cert and --tls_key), or give --insecure "
                "(insecure=True) on a network that you trust."
            )
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self.uses_tls:
                files = self._files(serves=True)
                found = server.add_secure_port(
                    target,
                    grpc.ssl_server_credentials(
                        [(files.key, files.cert)], files.ca, files.ca is not None
                    ),
                )
            else:
                found = server.add_insecure_port(target)
        except RuntimeError:
            found = 0
        if not found:
            raise OSError(f"Expected a free port. Received: {target}, which cannot be bound.")
        return found

    def accepts(self, metadata: Sequence[tuple[str, str | bytes]] | None) -> bool:
        """Returns whether a call's metadata have the job's token, if there is one."""
        if not self.token:
            return True
        shown = [value for key, value in metadata or () if key == TOKEN_KEY]
        value = shown[0] if len(shown) == 1 else b""
        value = value.encode() if isinstance(value, str) else value
        return hmac.compare_digest(value, self._token())

    def check(self) -> None:
        """Reads all files, so that what is wrong is said early.

        Raises:
            CredentialsError: If something cannot be used.
        """
        self._token()
        if self.uses_tls:
            self._files(serves=None)

    # How.

    def _token(self) -> bytes:
        token = self.token.encode(errors="surrogateescape")
        if len(token) > _MOST_TOKEN_BYTES:
            raise CredentialsError(
                f"Expected a token of at most {_MOST_TOKEN_BYTES} bytes. Received: "
                f"{len(token)} bytes. Is `token` the path or the content of another file?"
            )
        return token

    def _files(self, serves: bool | None) -> "_Files":
        """Returns what is in the files; `serves` says for which side, `None` for either."""
        if bool(self.tls_cert) != bool(self.tls_key) or (serves and not self.tls_cert):
            raise CredentialsError(
                "Expected a certificate and its private key, to serve with TLS or to show to "
                f"others. Received: tls_cert={self.tls_cert!r}, tls_key={self.tls_key!r}. Give "
                "both (TF_SYNCDIST_TLS_CERT and TF_SYNCDIST_TLS_KEY); docs/security.md says how "
                "to make them."
            )
        if serves is False and not self.tls_ca:
            raise CredentialsError(
                "Expected the CA that has signed the service's certificate, to verify it. "
                f"Received: tls_cert={self.tls_cert!r} without `tls_ca`. Give `tls_ca` "
                "(TF_SYNCDIST_TLS_CA)."
            )
        ca, key, cert = (
            _read(name, getattr(self, name)) for name in ("tls_ca", "tls_key", "tls_cert")
        )
        if self.tls_cert:
            _check_pem(
                "a certificate and its own private key, both as PEM and without a password",
                f"tls_cert={self.tls_cert!r}, tls_key={self.tls_key!r}",
                lambda context: context.load_cert_chain(self.tls_cert, self.tls_key, lambda: ""),
            )
        if self.tls_ca:
            _check_pem(
                "certificates as PEM",
                f"tls_ca={self.tls_ca!r}",
                lambda context: context.load_verify_locations(self.tls_ca),
            )
        return _Files(ca, key, cert)


NO_CREDENTIALS = Credentials()
"""Neither TLS nor a token, for the same machine only."""


class _Files(NamedTuple):
    ca: bytes | None
    key: bytes | None
    cert: bytes | None


def read_token(path: str) -> str:
    """Returns the token in a file, without the end of its line.

    Raises:
        CredentialsError: If there is none.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            token = file.read(_MOST_TOKEN_BYTES + 1).strip()
    except OSError as e:
        raise CredentialsError(
            f"Expected a file with the job's token. Received: {path!r} ({e.strerror}). Check the "
            "path and who may read it."
        ) from e
    if not token:
        raise CredentialsError(
            f"Expected a file with the job's token. Received: {path!r}, which is empty."
        )
    return token


def last_error(channel: grpc.Channel, timeout_seconds: float = 1.0) -> str:
    """Returns why a channel does not connect, in gRPC's words; empty if it does not say."""
    try:
        channel.unary_unary(wire.REPORT)(b"", timeout=timeout_seconds)
    except grpc.RpcError as e:
        if e.code() == grpc.StatusCode.UNAVAILABLE:
            return " ".join(str(e.details()).split())[:500]
    return ""


def _read(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as e:
        raise CredentialsError(
            f"Expected a PEM file. Received: {name}={path!r} ({e.strerror}). Check the path "
            f"({_VARIABLES[name]} may have set it) and who may read it."
        ) from e


def _check_pem(expected: str, received: str, load: Callable[[ssl.SSLContext], None]) -> None:
    """Foresees what gRPC would only say by refusing every connection."""
    try:
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    except (ssl.SSLError, ValueError) as e:
        reason = getattr(e, "reason", None) or str(e) or type(e).__name__
        raise CredentialsError(
            f"Expected {expected}. Received: {received}, which cannot be used ({reason})."
        ) from e


class _Details(NamedTuple):
    """What gRPC asks of the details of a call."""

    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _AddToken(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sends the token with every call of a channel."""

    def __init__(self, token: bytes) -> None:
        self._metadata = ((TOKEN_KEY, token),)

    def _call(self, continuation: Callable, details: Any, request: Any | Iterator[Any]) -> Any:
        metadata = (*(details.metadata or ()), *self._metadata)
        return continuation(
            _Details(
                details.method,
                details.timeout,
                metadata,
                details.credentials,
                getattr(details, "wait_for_ready", None),
                getattr(details, "compression", None),
            ),
            request,
        )

    intercept_unary_unary = _call
    intercept_unary_stream = _call
    intercept_stream_unary = _call
    intercept_stream_stream = _call
