"""What a server checks of a call before it reads anything else, and what it has refused."""

import collections
import threading
from collections.abc import Callable, Collection
from typing import Any

import grpc

from tf_syncdist.transport.credentials import Credentials

NO_TOKEN = "call without the job's token"
UNKNOWN_METHOD = "call of an unknown method"

_NO_TOKEN_DETAILS = (
    "Expected the job's token with every call. Received: another one, or none. Give every task of "
    "the job the same token (`token`, TF_SYNCDIST_TOKEN or --token_file)."
)


class Refusals:
    """Counts what a server has refused, by the reason, and logs without flooding the log.

    Args:
        on_event: Called with one line for the server's log, at the first, tenth, hundredth ...
            time of each reason.
    """

    def __init__(self, on_event: Callable[[str], None]) -> None:
        self._on_event = on_event
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, reason: str, details: str) -> None:
        """Takes note of something refused.

        Args:
            reason: One of few, in words.
            details: What was said to whom was refused.
        """
        with self._lock:
            self._counts[reason] += 1
            count = self._counts[reason]
        if str(count).strip("0") == "1":
            line = " ".join(details.split())
            self._on_event(f"refused, for the {_ordinal(count)} time, {reason}: {line}")

    def counts(self) -> dict[str, int]:
        """Returns how often something was refused, by the reason."""
        with self._lock:
            return dict(self._counts)


class CallGuard(grpc.ServerInterceptor):
    """Lets calls through that have the job's token and are of a known method.

    Give it to every server, also to one without a token. Nothing of a refused call is read but its
    headers.

    Args:
        credentials: What the server demands.
        methods: The full names of the server's methods.
        refusals: Counts what is refused.
    """

    def __init__(
        self, credentials: Credentials, methods: Collection[str], refusals: Refusals
    ) -> None:
        self._credentials = credentials
        self._methods = frozenset(methods)
        self._refusals = refusals

    def intercept_service(
        self, continuation: Callable, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Returns who handles a call; called by gRPC."""
        if not self._credentials.accepts(handler_call_details.invocation_metadata):
            return self._refuse(grpc.StatusCode.UNAUTHENTICATED, NO_TOKEN, _NO_TOKEN_DETAILS)
        if handler_call_details.method not in self._methods:
            return self._refuse(
                grpc.StatusCode.UNIMPLEMENTED,
                UNKNOWN_METHOD,
                f"Expected one of {', '.join(sorted(self._methods))}. Received: "
                f"{handler_call_details.method[:200]!r}. Install the same tf_syncdist everywhere.",
            )
        return continuation(handler_call_details)

    def _refuse(self, code: grpc.StatusCode, reason: str, details: str) -> grpc.RpcMethodHandler:
        self._refusals.add(reason, details)

        def refuse(requests: Any, context: grpc.ServicerContext) -> None:
            context.abort(code, details)

        # Handled as a stream, a call of any kind ends before its first message is read.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _ordinal(count: int) -> str:
    return "first" if count == 1 else f"{count}th"
