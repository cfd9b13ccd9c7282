"""A TCP proxy of the tests' own, which can be cut, healed and reset."""

import contextlib
import socket
import struct
import threading

_CHUNK_BYTES = 1 << 16
_POLL_SECONDS = 0.2
# Closing with this option sends a reset, as a machine does that knows nothing of a connection.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to an address, and stands for the network between two machines.

    Args:
        target: Where connections are forwarded to, as "host:port".

    Attributes:
        address: Where it listens, as "host:port".
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_SECONDS)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Forwards nothing more, either way, and closes nothing; nobody is told."""
        self._flowing.clear()

    def heal(self) -> None:
        """Forwards again; what was held back meanwhile arrives now."""
        self._flowing.set()

    def reset(self) -> None:
        """Breaks all connections; new ones are forwarded."""
        with self._lock:
            broken, self._sockets = self._sockets, set()
        for sock in broken:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                # Wakes the thread that waits in recv, and tells the other side nothing.
                sock.shutdown(socket.SHUT_RD)
            sock.close()

    def close(self) -> None:
        """Ends all of it. May be called twice."""
        self._closed.set()
        self._flowing.set()
        self._thread.join(30)
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        while not self._closed.is_set():
            # During a cut a connection is made by the kernel, and nobody answers on it.
            if not self._flowing.wait(_POLL_SECONDS):
                continue
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                # A reset may close it at any moment; the next one is to find somebody.
                with contextlib.suppress(OSError):
                    self._forward(client)

    def _forward(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target, timeout=20)
        except OSError:
            client.close()
            return
        with self._lock:
            self._sockets |= {client, server}
        for source, sink in ((client, server), (server, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            source.settimeout(None)
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                while not self._flowing.wait(_POLL_SECONDS):
                    pass
                sink.sendall(data)
        with self._lock:
            mine = self._sockets & {source, sink}
            self._sockets -= mine
        for sock in mine:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
