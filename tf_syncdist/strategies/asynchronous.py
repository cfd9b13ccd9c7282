"""The asynchronous parameter server: every worker's step is added as soon as it is made."""

from typing import Any

import tensorflow as tf

from tf_syncdist.mixing import parameter_server
from tf_syncdist.mixing.centre_policies import AsyncCentre, serialize
from tf_syncdist.strategies.exchangers import CentreExchanger
from tf_syncdist.strategies.free_strategy import FreeStrategy
from tf_syncdist.strategies.learner_runs import Step
from tf_syncdist.strategies.mixed_variables import MixedVariables


class AsyncStrategy(FreeStrategy):
    """Every worker computes with the parameters of a moment ago, and pushes what its step changes.

    The worker's own optimizer makes the step; the difference goes to the service, which adds it and
    answers with the current parameters, everybody's steps in them. Workers never wait for one
    another. A step is *stale* by as many others as were added since its worker read the parameters;
    with p equally fast workers that is about p - 1. The batch size given to `model.fit` is that of
    each worker's step, and an epoch is one pass over the data, of which every worker takes its
    share. As p steps are added in the time of one, a lower learning rate than a single worker's may
    be needed.

    Evaluate, predict, save, get_weights and checkpoints see the current parameters. Statistics of
    batch normalisation travel like parameters; what optimizers hold stays with each worker. Metrics
    and callbacks are each worker's own, and so is the end of a fit. A worker that comes late begins
    with the current parameters.

    Args:
        max_staleness: A worker's step is left out where it is staler than this, and the worker goes
            on from the current parameters; the report counts it. Default: `None`, no bound. Set it
            if a slow worker's steps do harm; below p - 1 it wastes those of all.
        cluster_resolver: See `SyncReplicasStrategy`, as for all arguments below.
        insecure: See `SyncReplicasStrategy`.
        tls_cert: See `SyncReplicasStrategy`.
        tls_key: See `SyncReplicasStrategy`.
        tls_ca: See `SyncReplicasStrategy`.
        token: See `SyncReplicasStrategy`.
        transport: See `SyncReplicasStrategy`; what the service answers always travels over gRPC.
        detection_seconds: See `SyncReplicasStrategy`.
        limit_gbps: See `SyncReplicasStrategy`.
        connect_timeout_seconds: See `SyncReplicasStrategy`.
        timeout_seconds: How long to wait for the service's answers, and for the first parameters.
        print_report: See `SyncReplicasStrategy`.

    Raises:
        ValueError: If an argument cannot be.
        CredentialsError: If a certificate, key or token cannot be used or would be exposed.
        AggregatorUnreachableError: If the service does not answer in time.

    Example:

    >>> import keras
    >>> strategy = AsyncStrategy()
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")

    References:
        Dean et al.: Large Scale Distributed Deep Networks, NIPS 2012, section 4.1 (Downpour SGD).
    """

    def __init__(
        self,
        max_staleness: int | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        *,
        insecure: bool = False,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        token: str | None = None,
        transport: str = "auto",
        detection_seconds: float = 3.0,
        limit_gbps: float | None = None,
        connect_timeout_seconds: float = 30.0,
        timeout_seconds: float = 600.0,
        print_report: bool = True,
    ) -> None:
        self._policy = AsyncCentre(max_staleness)
        super().__init__(
            cluster_resolver,
            1,
            {
                "transport": transport,
                "detection_seconds": detection_seconds,
                "limit_gbps": limit_gbps,
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

    def _centre(self) -> str:
        return serialize(self._policy)

    def _described(self) -> str:
        return f"{type(self).__name__}()"

    def _make_exchanger(self) -> CentreExchanger:
        return CentreExchanger(self._member.session)

    def _mixed(self, step: Step, model: MixedVariables) -> Any:
        pulled = [v.read_value() for v in model.own]
        found = step.compute()
        differences = [
            parameter_server.difference(variable.read_value(), before)
            for variable, before in zip(model.own, pulled, strict=True)
        ]
        for variable, current in zip(model.own, self._exchange(differences, model), strict=True):
            variable.assign(current, read_value=False)
        return found
