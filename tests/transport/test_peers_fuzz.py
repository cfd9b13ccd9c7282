"""Strangers at a worker that serves its model: they are answered or refused, and others go on."""

import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_syncdist.errors import CredentialsError
from tf_syncdist.proto import tf_syncdist_peers_pb2 as pb
from tf_syncdist.transport import wire
from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.models import Model, ModelFormat
from tf_syncdist.transport.partners import Partners
from tf_syncdist.transport.peer_server import PeerServer

from .hostile import at_most
from .test_service_fuzz import FUZZ, NEAR, bodies

SEED = 5
MODELS = ModelFormat([("v", "float32", (4,))], SEED, 1)
SERVED = ModelFormat([("v", "float32", (4,))], SEED, 0)
ONE = [np.ones(4, "f4")]
GOOD = MODELS.write(Model(2, ONE))
CLEAN = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
CERTIFICATES = Path(__file__).parents[1] / "certificates"

MESSAGES = st.one_of(
    st.builds(lambda b, p: wire.encode(b, p), bodies(pb.ToPeer.DESCRIPTOR, NEAR), st.binary()),
    st.sampled_from([*GOOD, MODELS.pull_request(), GOOD[0][:-1], b""]),
    st.binary(max_size=60),
)


@pytest.fixture(scope="module")
def server() -> Iterator[PeerServer]:
    """A worker that has a model."""
    with PeerServer(worker=0) as server:
        server.begin(SEED, SERVED)
        server.publish(Model(1, [np.zeros(4, "f4")]))
        yield server


@settings(FUZZ, max_examples=120)
@given(st.lists(MESSAGES, max_size=3), st.sampled_from([wire.GREET, wire.PULL, wire.PUSH]))
def test_strangers_get_a_status_and_others_go_on(
    server: PeerServer, messages: list[bytes], method: str
) -> None:
    address = f"127.0.0.1:{server.port}"
    with grpc.insecure_channel(address) as channel, at_most():
        if method == wire.PUSH:
            call = channel.stream_stream(method)(iter(messages), timeout=30)
        else:
            call = channel.unary_stream(method)((*messages, b"")[0], timeout=30)
        try:
            told = list(call)
        except grpc.RpcError:
            told = []
        assert call.code() in CLEAN, call.details()
    for data in told if method == wire.PULL else ():
        wire.decode(pb.FromPeer, data)
    server.take_pushed()
    with Partners(1, SEED, 30.0) as partners:
        partners.update({0: address})
        assert partners.pull(0, MODELS).step == 1
        assert partners.push(0, MODELS, GOOD)
    pushed = server.take_pushed()
    assert pushed.count == 1 and pushed.inboxes[0].total.tolist() == [1.0] * 4


def test_who_says_nothing_holds_no_thread_for_ever(server: PeerServer) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for timeout in (None, 10_000.0):
            call = channel.unary_stream(wire.PULL)(MODELS.pull_request(), timeout=timeout)
            with pytest.raises(grpc.RpcError, match="Expected a deadline of at most"):
                list(call)


def test_a_push_that_breaks_off_is_not_counted(server: PeerServer) -> None:
    large = ModelFormat([("v", "float32", (2**20,))], SEED, 0)
    with PeerServer(worker=0) as other:
        other.begin(SEED, large)
        parts = large.write(Model(1, [np.ones(2**20, "f4")]))
        with grpc.insecure_channel(f"127.0.0.1:{other.port}") as channel:

            def half() -> Iterator[bytes]:
                yield parts[0]
                raise RuntimeError("the sender fails")

            with pytest.raises(grpc.RpcError):
                channel.stream_unary(wire.PUSH)(half(), timeout=30)
        assert not other.take_pushed().count


def test_others_need_the_token() -> None:
    with PeerServer(worker=0, credentials=Credentials(token="right")) as server:
        server.begin(SEED, SERVED)
        server.publish(Model(1, ONE))
        for token, found in (("right", 1), ("wrong", None), ("", None)):
            with Partners(1, SEED, 30.0, credentials=Credentials(token=token)) as partners:
                partners.update({0: f"127.0.0.1:{server.port}"})
                model = partners.pull(0, MODELS)
                assert (model and model.step) == found
        assert server.refused == {"call without the job's token": 2}


def test_models_travel_by_mutual_tls() -> None:
    def credentials(name: str) -> Credentials:
        cert, key = (str(CERTIFICATES / f"{name}.{end}") for end in ("pem", "key"))
        return Credentials(tls_cert=cert, tls_key=key, tls_ca=str(CERTIFICATES / "ca.pem"))

    with PeerServer(worker=0, host="127.0.0.1", credentials=credentials("task")) as server:
        server.begin(SEED, SERVED)
        server.publish(Model(1, ONE))
        for name, found in (("task", 1), ("stranger", None)):
            with Partners(1, SEED, 30.0, credentials=credentials(name)) as partners:
                partners.update({0: f"127.0.0.1:{server.port}"})
                model = partners.pull(0, MODELS)
                assert (model and model.step) == found


def test_addresses_beyond_loopback_need_tls() -> None:
    with pytest.raises(CredentialsError, match="Expected a loopback address"):
        PeerServer(worker=0, host="0.0.0.0")


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="Expected a free port"):
            PeerServer(worker=0, port=taken.getsockname()[1])
