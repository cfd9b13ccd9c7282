"""How a worker mixes its model with others where no worker waits for another. No TensorFlow.

An exchanger is given models as flat arrays, and gives others back: those of a centre in the
service, or those of partners.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from tf_syncdist.observability.mixing_reports import Exchanges
from tf_syncdist.propagation.slices import TensorSpec, plan
from tf_syncdist.transport.gossiping import Gossip
from tf_syncdist.transport.partners import Partners
from tf_syncdist.transport.peer_server import PeerServer
from tf_syncdist.transport.session import Session
from tf_syncdist.transport.states import Spec

Values = list[np.ndarray]

# How long a worker that begins waits for those that may have a model already.
_GRACE_SECONDS = 5.0
_LOOK_SECONDS = 0.02


class _Renamed(Exception):
    """A service that was started again has learnt the job's name from other workers."""


class Exchanger(Protocol):
    """What runs need to mix models."""

    def start(
        self, variables: Sequence[Spec], values: Values, key: tuple[int, int]
    ) -> tuple[Values, tuple[int, int]]:
        """Returns the model with which a worker begins, and which training it is of.

        Args:
            variables: Name, dtype and shape of the variables.
            values: Those of this worker, as its program has made them.
            key: The fit and how often the program has written the variables within it: another one
                than before if what was mixed before is void. A worker that comes late takes part
                in the training of the others, whatever it says.
        """
        ...

    def exchange(self, step: int, values: Values) -> Values:
        """Returns what others say to a worker's values; new arrays, or the given ones."""
        ...

    def consensus(self, step: int, values: Values, in_run: bool) -> Values:
        """Returns the model that all workers have come to, given this worker's own.

        Args:
            step: How many steps this worker has begun.
            values: Its model.
            in_run: Whether a step is being taken just now, so that the model may be half of it.
        """
        ...

    def exchanges(self) -> Exchanges:
        """Returns what this worker has counted."""
        ...

    def interrupt(self) -> None:
        """Ends a wait for others, on any thread; nothing is exchanged from then on."""
        ...

    def close(self) -> None:
        """Ends it. May be called twice."""
        ...


class CentreExchanger:
    """Mixes with a centre that the service holds.

    Args:
        session: The connection to the service.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._has_begun = False
        self._counts = Exchanges()

    def start(
        self, variables: Sequence[Spec], values: Values, key: tuple[int, int]
    ) -> tuple[Values, tuple[int, int]]:
        """Returns the centre; see `Exchanger`."""
        config = self._session.config
        way = plan(
            [TensorSpec(dtype, tuple(shape)) for _, dtype, shape in variables],
            None,
            len(config.addresses),
            config.num_workers,
        )
        joins, self._has_begun = not self._has_begun, True
        centre, key = self._session.open_centre(variables, way, values, key, joins)
        return _copied(centre), key

    def exchange(self, step: int, values: Values) -> Values:
        """Returns what the service answers; see `Exchanger`."""
        del step
        centre, mixed = self._session.mix(values)
        counts, is_mixed = self._counts, mixed.too_stale < mixed.slices
        # Staleness is that of what was mixed, as the service counts it.
        staleness = mixed.staleness if is_mixed else 0
        self._counts = counts._replace(
            exchanges=counts.exchanges + 1,
            mixed=counts.mixed + is_mixed,
            too_stale=counts.too_stale + (mixed.too_stale > 0),
            staleness_sum=counts.staleness_sum + staleness,
            staleness_max=max(counts.staleness_max, staleness),
        )
        return _copied(centre)

    def consensus(self, step: int, values: Values, in_run: bool) -> Values:
        """Returns the centre; see `Exchanger`."""
        del step, values, in_run
        return _copied(self._session.read_centre())

    def exchanges(self) -> Exchanges:
        """Returns what this worker has counted."""
        return self._counts

    def interrupt(self) -> None:
        """Does nothing: it is the session that waits."""

    def close(self) -> None:
        """Does nothing."""


class GossipExchanger:
    """Mixes with partners; a server of this worker's own serves its model to them.

    Args:
        mode: "pull" or "push"; see `Gossip`.
        session: The connection to the service, which tells where the others are.
        server: Serves this worker's model.
        candidates: The workers among which a partner is drawn; all by default.
        timeout_seconds: How long a partner may take to answer.
        on_notice: Called with one line for the user.
    """

    def __init__(
        self,
        mode: str,
        session: Session,
        server: PeerServer,
        candidates: Sequence[int] | None,
        timeout_seconds: float,
        on_notice: Callable[[str], None],
    ) -> None:
        config = session.config
        self._mode = mode
        self._session = session
        self._server = server
        self._candidates = range(config.num_workers) if candidates is None else candidates
        self._timeout = timeout_seconds
        self._on_notice = on_notice
        self._partners: Partners | None = None
        self._gossip: Gossip | None = None

    def heard(self, worker: int) -> None:
        """Takes note that a worker has called this one's server."""
        if self._partners is not None:
            self._partners.heard(worker)

    def start(
        self, variables: Sequence[Spec], values: Values, key: tuple[int, int]
    ) -> tuple[Values, tuple[int, int]]:
        """Returns the model of a partner, or worker 0's at the start; see `Exchanger`.

        If the job is in progress and nobody has its model, the user is told.
        """
        is_first = self._gossip is None
        if is_first:
            self._wait_for_others()
        while True:
            seed = self._session.job_seed
            if is_first:
                self._meet(seed)
            try:
                begun = self._gossip.start(
                    variables,
                    values,
                    seed,
                    self._session.config.timeout_seconds,
                    functools.partial(self._check, seed),
                    is_first,
                    key,
                )
                break
            except _Renamed:
                continue
        if is_first and self._gossip.began_alone and self._session.came_again is not None:
            self._on_notice(
                "no worker has a model of this job (any more), so worker "
                f"{self._session.config.worker} begins with its own; load what was saved before, "
                "if anything was"
            )
        return begun

    def exchange(self, step: int, values: Values) -> Values:
        """Returns the mixed model; see `Exchanger`."""
        return self._gossip.exchange(step, values)

    def consensus(self, step: int, values: Values, in_run: bool) -> Values:
        """Returns the mean of all models of this training; see `Exchanger`."""
        return self._gossip.average(step, values, in_run)

    def exchanges(self) -> Exchanges:
        """Returns what this worker has counted."""
        return Exchanges() if self._gossip is None else Exchanges(**self._gossip.counts._asdict())

    def interrupt(self) -> None:
        """Ends the calls in progress; see `Exchanger`."""
        if self._partners is not None:
            self._partners.cancel()

    def close(self) -> None:
        """Ends the server and the calls. May be called twice."""
        if self._partners is not None:
            self._partners.close()
        self._server.close()

    def _meet(self, seed: int) -> None:
        """Gets to know the partners of a job by its name."""
        if self._partners is not None:
            self._partners.close()
        config = self._session.config
        self._partners = Partners(
            config.worker, seed, self._timeout, config.credentials, self._on_notice
        )
        self._gossip = Gossip(
            self._mode,
            config.worker,
            self._candidates,
            self._server,
            self._partners,
            lambda: self._session.served_at,
            seed,
            self._session.has_started,
        )

    def _check(self, seed: int) -> None:
        self._session.check()
        if self._session.job_seed != seed:
            raise _Renamed

    def _wait_for_others(self) -> None:
        """Waits a while for those that may have a model already, and know the job's name."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while not self._session.has_started() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)


def _copied(values: Sequence[np.ndarray]) -> Values:
    return [v.copy() for v in values]
