"""Elastic averaging: workers and a centre are drawn to one another, and nobody waits."""

from typing import Any

import tensorflow as tf

from tf_syncdist.mixing import elastic
from tf_syncdist.mixing.centre_policies import ElasticCentre, serialize
from tf_syncdist.strategies.exchangers import CentreExchanger
from tf_syncdist.strategies.free_strategy import FreeStrategy
from tf_syncdist.strategies.learner_runs import Step
from tf_syncdist.strategies.mixed_variables import MixedVariables


class ElasticAveragingStrategy(FreeStrategy):
    """Every worker trains a model of its own, tied to a common centre as if by a spring.

    After the gradient is computed and before its own step counts, a worker sends its model to the
    centre, which the service holds, and is told where the centre was. Both then move towards each
    other by the same part of their difference. Workers never wait for one another: each exchange is
    between one worker and the centre. The batch size given to `model.fit` is that of each worker,
    and an epoch is one pass over the data, of which every worker takes its share.

    Evaluate, predict, save, get_weights and checkpoints see the centre. Statistics of batch
    normalisation are mixed like parameters; what optimizers hold stays with each worker. Metrics
    and callbacks are each worker's own, and so is the end of a fit. A worker that comes late begins
    with the centre.

    Args:
        moving_rate: alpha, the part of the difference by which both sides move, above 0 and below
            1. Default: 0.8 / workers, which is stable for any number of workers. Lower it if
            workers are to explore further from the centre.
        period: Models are mixed in one of so many runs, from 1 (the default). Raise it if the
            network, not the computation, sets the pace; models are then further apart.
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
        timeout_seconds: How long to wait for the service's answers, and for a centre at the start.
        print_report: See `SyncReplicasStrategy`.

    Raises:
        ValueError: If an argument cannot be.
        CredentialsError: If a certificate, key or token cannot be used or would be exposed.
        AggregatorUnreachableError: If the service does not answer in time.

    Example:

    >>> import keras
    >>> strategy = ElasticAveragingStrategy()
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")

    References:
        Zhang, Choromanska, LeCun: Deep learning with Elastic Averaging SGD, arXiv 1412.6651; Jin,
        Yuan, Iandola, Keutzer: How to scale distributed deep learning?, arXiv 1611.04581.
    """

    def __init__(
        self,
        moving_rate: float | None = None,
        period: int = 1,
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
        if moving_rate is not None:
            ElasticCentre(moving_rate)
        self._moving_rate = moving_rate
        super().__init__(
            cluster_resolver,
            period,
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

    @property
    def moving_rate(self) -> float:
        """alpha: by what part of their difference a model and the centre move."""
        if self._moving_rate is not None:
            return self._moving_rate
        return elastic.default_moving_rate(self.num_workers)

    def _centre(self) -> str:
        return serialize(ElasticCentre(self.moving_rate))

    def _make_exchanger(self) -> CentreExchanger:
        return CentreExchanger(self._member.session)

    def _mixed(self, step: Step, model: MixedVariables) -> Any:
        before = [v.read_value() for v in model.own]
        # Travels while the step is computed.
        centre = self._exchange(before, model)
        found = step.compute()
        for variable, own, other in zip(model.own, before, centre, strict=True):
            given = elastic.difference(own, other, self.moving_rate)
            variable.assign_sub(given, read_value=False)
        return found
