"""Gossip: workers average their models with those of partners that they draw at random."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import tensorflow as tf

from tf_syncdist.cluster.addresses import is_loopback
from tf_syncdist.strategies.exchangers import GossipExchanger
from tf_syncdist.strategies.free_strategy import FreeStrategy
from tf_syncdist.strategies.learner_runs import Step
from tf_syncdist.strategies.lifetime import say
from tf_syncdist.strategies.mixed_variables import MixedVariables
from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.gossiping import MODES
from tf_syncdist.transport.peer_server import PeerServer


class GossipStrategy(FreeStrategy):
    """Every worker trains a model of its own and averages it, after its step, with a partner's.

    Models do not pass through a service: each worker serves its own to the others. The aggregation
    service only tells who is there, and where. Workers never wait for one another: what a partner
    has shown last may be some steps old, but it is always whole. The batch size given to
    `model.fit` is that of each worker, and an epoch is one pass over the data, of which every
    worker takes its share.

    Evaluate, predict, save, get_weights and checkpoints see the mean of the models of all workers
    that train this model now, or have ended; training goes on with each worker's own. Statistics of
    batch normalisation are mixed like parameters; what optimizers hold stays with each worker.
    Metrics and callbacks are each worker's own, and so is the end of a fit. A worker that comes
    late begins with the model of another one.

    A partner that does not answer costs `partner_timeout_seconds` once. It is not drawn again until
    it is heard of again.

    A worker serves at its own address in the cluster. Where the cluster has no `ps` task, the
    service has worker 0's, so that worker serves at another port of the same host; use a `ps` task
    where a firewall allows the ports of the cluster only.

    Args:
        mode: "pull" (the default) averages with the model that the partner shows: it mixes faster,
            and only the worker itself waits for the network. "push" hands the own model over, and
            averages with all that others have handed over meanwhile: take it if some workers are
            much slower than others, whose old models would hold back those that pull them.
        period: Models are mixed in one of so many runs, from 1 (the default). Raise it if the
            network, not the computation, sets the pace; models are then further apart.
        partners: The workers among which each draws its partner: "uniform" (the default) for all,
            or a list of indices, which must have the worker's own in it: to draw itself means to
            mix with nobody in that run.
        partner_timeout_seconds: How long a partner may take to answer, besides a second for every
            10 MiB of the model. Default: 2.
        cluster_resolver: See `SyncReplicasStrategy`, as for all arguments below.
        insecure: See `SyncReplicasStrategy`; it is about the address of every worker here.
        tls_cert: See `SyncReplicasStrategy`; every worker serves with it.
        tls_key: See `SyncReplicasStrategy`.
        tls_ca: See `SyncReplicasStrategy`.
        token: See `SyncReplicasStrategy`.
        detection_seconds: See `SyncReplicasStrategy`.
        connect_timeout_seconds: See `SyncReplicasStrategy`.
        timeout_seconds: How long to wait for a model at the start.
        print_report: See `SyncReplicasStrategy`.

    Raises:
        ValueError: If an argument cannot be.
        CredentialsError: If a certificate, key or token cannot be used or would be exposed.
        AggregatorUnreachableError: If the service does not answer in time.

    Example:

    >>> import keras
    >>> strategy = GossipStrategy(mode="pull")
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")

    References:
        Jin, Yuan, Iandola, Keutzer: How to scale distributed deep learning?, arXiv 1611.04581,
        gossiping SGD.
    """

    def __init__(
        self,
        mode: str = "pull",
        period: int = 1,
        partners: str | Sequence[int] = "uniform",
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        *,
        partner_timeout_seconds: float = 2.0,
        insecure: bool = False,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        token: str | None = None,
        detection_seconds: float = 3.0,
        connect_timeout_seconds: float = 30.0,
        timeout_seconds: float = 600.0,
        print_report: bool = True,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}.")
        if not 0 < partner_timeout_seconds <= 600:
            raise ValueError(
                "`partner_timeout_seconds` must be above 0 and at most 600. Received: "
                f"partner_timeout_seconds={partner_timeout_seconds!r}."
            )
        self._mode = mode
        self._partners = partners
        self._partner_timeout = partner_timeout_seconds
        self._server: PeerServer | None = None
        try:
            super().__init__(
                cluster_resolver,
                period,
                {
                    "transport": "grpc",
                    "detection_seconds": detection_seconds,
                    "limit_gbps": None,
                    "connect_timeout_seconds": connect_timeout_seconds,
                    "timeout_seconds": timeout_seconds,
                },
                {
                    "insecure": insecure,
                    "tls_cert": tls_cert,
                    "tls_key": tls_key,
                    "tls_ca": tls_ca,
                    "token": token,
                },
                print_report,
            )
        except BaseException:
            if self._server is not None:
                self._server.close()
            raise

    def _serves(self, credentials: Credentials) -> str:
        _check_partners(self._partners, self._role.task_index, self._role.num_workers)
        role = self._role
        name, _, port = role.address.rpartition(":")
        host = name.strip("[]")
        # A cluster's name for a machine (a Kubernetes service, say) need not be an interface of it.
        bound = "127.0.0.1" if host == "localhost" else host if is_loopback(host) else "0.0.0.0"
        free = not role.aggregators and role.task_index == 0
        try:
            server = self._serve(bound, 0 if free else int(port), credentials)
        except OSError:
            server = self._serve(bound, 0, credentials)
            say(
                f"worker {role.task_index} serves its model at port {server.port}, since {port}, "
                "which the cluster names, is taken"
            )
        self._server = server
        return f"{name}:{server.port}"

    def _serve(self, host: str, port: int, credentials: Credentials) -> PeerServer:
        return PeerServer(self._role.task_index, host, port, credentials, self._heard)

    def _heard(self, worker: int) -> None:
        exchanger = getattr(self, "_exchanger", None)
        if exchanger is not None:
            exchanger.heard(worker)

    def _described(self) -> str:
        return f"{type(self).__name__}(mode={self._mode!r}, period={self._period})"

    def _make_exchanger(self) -> GossipExchanger:
        return GossipExchanger(
            self._mode,
            self._member.session,
            self._server,
            None if _is_uniform(self._partners) else self._partners,
            self._partner_timeout,
            say,
        )

    def _mixed(self, step: Step, model: MixedVariables) -> Any:
        found = step.compute()
        mixed = self._exchange([v.read_value() for v in model.own], model)
        for variable, value in zip(model.own, mixed, strict=True):
            variable.assign(value, read_value=False)
        return found


def _is_uniform(partners: str | Sequence[int]) -> bool:
    return isinstance(partners, str) and partners == "uniform"


def _check_partners(partners: str | Sequence[int], worker: int, num_workers: int) -> None:
    if _is_uniform(partners):
        return
    is_list = isinstance(partners, Iterable) and not isinstance(partners, str)
    indices = list(partners) if is_list else []
    known = all(isinstance(i, Integral) and 0 <= i < num_workers for i in indices)
    if not indices or not known:
        raise ValueError(
            f'`partners` must be "uniform", or a list of workers from 0 to {num_workers - 1}. '
            f"Received: partners={partners!r}."
        )
    if worker not in indices:
        raise ValueError(
            "`partners` must have the worker itself in it, because a worker that draws itself "
            "keeps its model, as the rule of gossip wants. "
            f"Received: partners={partners!r} on worker {worker}. Add {worker}."
        )
