"""The tests' own proxy does to connections what a network does."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from .proxy import Proxy

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy in front of a server that sends back what it is sent."""
    listener = socket.create_server(("127.0.0.1", 0))

    def echo(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(1000):
                sock.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with Proxy(f"127.0.0.1:{listener.getsockname()[1]}") as started:
        yield started
    listener.close()


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def ask(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    return sock.recv(1000)


def test_it_forwards_both_ways(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        assert ask(one, b"a") == b"a"
        assert ask(other, b"b") == b"b"


def test_a_cut_holds_everything_back_and_closes_nothing(proxy: Proxy) -> None:
    with connect(proxy) as before:
        assert ask(before, b"a") == b"a"
        proxy.cut()
        before.settimeout(0.5)
        with pytest.raises(TimeoutError):
            ask(before, b"b")
        with connect(proxy) as during:
            during.settimeout(0.5)
            with pytest.raises(TimeoutError):
                ask(during, b"c")
            proxy.heal()
            for sock, held in ((before, b"b"), (during, b"c")):
                sock.settimeout(20)
                assert sock.recv(1000) == held
                assert ask(sock, b"d") == b"d"


def test_a_reset_breaks_what_is_there_and_lets_new_connections_through(proxy: Proxy) -> None:
    with connect(proxy) as before:
        assert ask(before, b"a") == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            before.recv(1000)
        with connect(proxy) as after:
            assert ask(after, b"b") == b"b"


def test_it_is_closed_for_good_and_may_be_closed_twice(proxy: Proxy) -> None:
    with connect(proxy) as before:
        assert ask(before, b"a") == b"a"
        proxy.cut()
        proxy.close()
        proxy.close()
        with contextlib.suppress(ConnectionResetError):
            assert before.recv(1000) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)


def test_without_a_server_behind_it_connections_end(proxy: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Proxy(f"127.0.0.1:{port}") as other, connect(other) as sock:
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1000) == b""
