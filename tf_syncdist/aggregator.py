"""`python -m tf_syncdist.aggregator`: the aggregation service as a process."""

import os
import signal
import sys
import threading

from absl import app, flags

from tf_syncdist.aggregation.limits import Limits
from tf_syncdist.aggregation.server import AggregatorServer
from tf_syncdist.cluster.service_environment import restart_in_service_environment
from tf_syncdist.transport.allocator import keep_freed_memory
from tf_syncdist.transport.credentials import Credentials, read_token

_PORT = flags.DEFINE_integer("port", 0, "Port to listen on; 0 picks a free one and prints it.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_INSECURE = flags.DEFINE_bool(
    "insecure", False, "Allow an address beyond loopback without TLS, on a network you trust."
)
_TLS_CERT = flags.DEFINE_string(
    "tls_cert", None, "PEM file with the service's certificate. Default: TF_SYNCDIST_TLS_CERT."
)
_TLS_KEY = flags.DEFINE_string(
    "tls_key", None, "PEM file with the private key of --tls_cert. Default: TF_SYNCDIST_TLS_KEY."
)
_TLS_CA = flags.DEFINE_string(
    "tls_ca",
    None,
    "PEM file with the CA that must have signed the certificate of every client. "
    "Default: TF_SYNCDIST_TLS_CA.",
)
_TOKEN_FILE = flags.DEFINE_string(
    "token_file",
    None,
    "File with the job's token, which is no flag because everybody on the machine can read those. "
    "Default: the token in TF_SYNCDIST_TOKEN.",
)
_MAX_WORKER_BYTES = flags.DEFINE_integer(
    "max_worker_bytes",
    0,
    "How many bytes one worker may make the service keep. Default: half of the memory that is "
    "available at the start. Raise it if a worker is refused that the machine has room for.",
    lower_bound=0,
)
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds", 30 * 24 * 3600.0, "Give up serving after this long, in seconds."
)
_RECORD_TRACE = flags.DEFINE_string(
    "record_trace",
    "",
    "File in which it is recorded how long workers take for each round. Only of use for the first "
    "of several services, which knows of all exchanges. Default: none.",
)
_PARENT_FD = flags.DEFINE_integer(
    "parent_fd", -1, "File descriptor of a pipe; its end of file means that the parent is gone."
)
_QUIET = flags.DEFINE_bool("quiet", False, "Do not print who joins and leaves.")


def _say(text: str) -> None:
    print(f"tf_syncdist aggregator: {text}", flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}.")
    keep_freed_memory(one_arena=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        credentials = Credentials.from_environment(
            tls_cert=_TLS_CERT.value,
            tls_key=_TLS_KEY.value,
            tls_ca=_TLS_CA.value,
            token=None if _TOKEN_FILE.value is None else read_token(_TOKEN_FILE.value),
            insecure=_INSECURE.value,
        )
        server = AggregatorServer(
            _HOST.value,
            _PORT.value,
            credentials,
            (lambda _: None) if _QUIET.value else _say,
            Limits(_MAX_WORKER_BYTES.value),
            _RECORD_TRACE.value,
        )
    except (ValueError, OSError) as e:
        sys.exit(f"tf_syncdist aggregator: {e}")
    with server:
        print(f"tf_syncdist aggregator listening on {_HOST.value}:{server.port}", flush=True)
        if _PARENT_FD.value >= 0:
            threading.Thread(
                target=_watch, args=(_PARENT_FD.value, server, stop), daemon=True
            ).start()
        waited = 0.0
        while not stop.is_set() and not server.wait(0.2):
            waited += 0.2
            if waited >= _MAX_SECONDS.value:
                _say(f"ends after --max_seconds={_MAX_SECONDS.value:g}")
                break


def _watch(fd: int, server: AggregatorServer, stop: threading.Event) -> None:
    while os.read(fd, 1):
        pass
    if server.job.in_progress:
        # Worker 0 is dead, and the job ends with it: no round may be closed without it now.
        os._exit(1)
    stop.set()


if __name__ == "__main__":
    restart_in_service_environment()
    app.run(main)
