"""A worker's gossip: after some steps it mixes its model with that of a partner, drawn at random.

Without TensorFlow: models come and go as flat arrays. One thread at a time may use it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tf_syncdist.errors import WaitTimeoutError
from tf_syncdist.mixing import gossip
from tf_syncdist.transport.models import Model, ModelFormat
from tf_syncdist.transport.partners import Partners
from tf_syncdist.transport.peer_server import PeerServer
from tf_syncdist.transport.states import Spec

MODES = ("pull", "push")

_LOOK_SECONDS = 0.05
# Who begins has a model at once, unless it fails; and a service that was started again knows who is
# there by then.
_BEGIN_SECONDS = 5.0


class GossipCounts(NamedTuple):
    """What a worker's gossip has come to.

    Args:
        exchanges: How often it drew a partner.
        with_itself: How often the partner was itself.
        failed: How often the partner did not answer.
        mixed: How many models of others it has mixed with its own.
        staleness_sum: For models that were pulled, by how many steps they were behind this
            worker's own (or ahead of it), summed up.
        staleness_max: The most of that.
    """

    exchanges: int = 0
    with_itself: int = 0
    failed: int = 0
    mixed: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0


class _Found(NamedTuple):
    """What a worker that begins has found.

    Args:
        models: What the models of its training look like.
        model: That of the worker that is furthest in it; `None` if nobody has one.
        is_over: Whether others have gone on to a later training than the worker's own.
        begins: Whether a worker of lower index begins with it just now, and has no model yet; or
            whether one has not answered, where this one looks for its first model.
        is_late: Whether all others have ended, worker 0 too, so nobody will come with a model.
        is_lowest: Whether this worker takes part, and none of lower index.
    """

    models: ModelFormat
    model: Model | None
    is_over: bool
    begins: bool
    is_late: bool
    is_lowest: bool


class Gossip:
    """Mixes one worker's model with those of others.

    Args:
        mode: "pull" averages with the model that the partner has shown last, "push" hands the
            worker's own over and averages with what others have handed to it.
        worker: This worker.
        candidates: The workers among which a partner is drawn, this one included.
        server: Serves this worker's model.
        partners: Calls the others.
        addresses: Returns where the workers are: those that take part, and those that are done.
        seed: Of the draws.
        all_have_come: Returns whether all workers have come, worker 0 too, whoever is there now.

    Attributes:
        counts: See `GossipCounts`.
        began_alone: Whether this worker began with its own model, since nobody showed one.
    """

    def __init__(
        self,
        mode: str,
        worker: int,
        candidates: Sequence[int],
        server: PeerServer,
        partners: Partners,
        addresses: Callable[[], tuple[Mapping[int, str], Mapping[int, str]]],
        seed: int,
        all_have_come: Callable[[], bool] = lambda: False,
    ) -> None:
        self._mode = mode
        self._worker = worker
        self._candidates = tuple(candidates)
        self._server = server
        self._partners = partners
        self._addresses = addresses
        self._random = np.random.default_rng([seed, worker])
        self._all_have_come = all_have_come
        self._models: ModelFormat | None = None
        self._shown: Sequence[bytes] = ()
        self.began_alone = False
        self.counts = GossipCounts()

    def start(
        self,
        variables: Sequence[Spec],
        values: list[np.ndarray],
        job_seed: int,
        timeout_seconds: float,
        check: Callable[[], None],
        is_first: bool = True,
        key: tuple[int, int] = (0, 0),
    ) -> tuple[list[np.ndarray], tuple[int, int]]:
        """Returns the model with which this worker begins, and which training it is of.

        That is the model of the worker that is furthest in this training, if any is in it. A worker
        that comes late takes part in the latest one of its variables, whichever its own would be;
        if all others have ended, it begins where they have come to.
        At the start of a job nobody has a model; then all begin with worker 0's, or if it has come
        and gone, with that of the lowest index among those that are there. A later training
        begins with the model of the worker that comes to it first; of several that come in the same
        moment, with that of the lowest index.

        Args:
            variables: Name, dtype and shape of the variables.
            values: This worker's own, as flat arrays.
            job_seed: Names the job.
            timeout_seconds: How long to wait for worker 0.
            check: Raises an error where the wait is to end.
            is_first: Whether this is the worker's first model.
            key: Which training it is; see `ModelFormat`.

        Raises:
            ModelMismatchError: If another worker trains other variables.
            WaitTimeoutError: If no model comes, or none can come.
        """
        models = ModelFormat(variables, job_seed, self._worker, key)
        self._server.begin(job_seed, models)
        deadline = time.monotonic() + timeout_seconds
        found = self._wait_for_model(models, is_first, deadline, timeout_seconds, check)
        if found.models is not models:
            self._server.begin(job_seed, found.models)
        self._models = found.models
        model = found.model or Model(0, values)
        self._show(model)
        self.began_alone = found.model is None
        # Who waited for worker 0 in vain is not the only one that could begin.
        is_second = is_first and self._worker and self.began_alone
        if (is_second or not is_first) and (found.model is None or not found.model.step):
            # One of lower index may have begun after the look at it, and not have seen this model;
            # who has given this worker its model may leave it for that one's.
            found = self._wait_for_model(models, False, deadline, timeout_seconds, check, True)
            if found.model is not None:
                model = found.model
                self._show(model)
                self.began_alone = False
        return model.values, found.models.key

    def _wait_for_model(
        self,
        models: ModelFormat,
        is_first: bool,
        deadline: float,
        timeout_seconds: float,
        check: Callable[[], None],
        of_lower: bool = False,
    ) -> _Found:
        begun = lowest_since = time.monotonic()
        while True:
            found = self._found(models, is_first, of_lower)
            now = time.monotonic()
            is_early = now - begun < _BEGIN_SECONDS
            if not found.is_lowest or found.is_late or not self._all_have_come():
                lowest_since = now
            # If worker 0 has gone without a model, the next one begins.
            is_due = not self._worker or now - lowest_since > _BEGIN_SECONDS
            waits = not is_due and is_first and found.model is None and not found.is_over
            begins = found.begins and is_early
            if not waits and not begins:
                return found
            check()
            if found.is_late and not is_early:
                raise WaitTimeoutError(
                    f"Worker {self._worker} came when all others had ended, and none of them "
                    "answers any more, so nobody has a model for it to begin with. Load what "
                    "they have saved, or begin a new job."
                )
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"Worker {self._worker} waited {timeout_seconds:g} s for a model to begin "
                    "with, worker 0's at the start, as long as `timeout_seconds` allows. Look at "
                    "worker 0's log."
                )
            time.sleep(_LOOK_SECONDS)

    def exchange(self, step: int, values: list[np.ndarray]) -> list[np.ndarray]:
        """Returns a worker's model after it was mixed, if it was.

        Args:
            step: How many steps the worker has taken.
            values: Its model as flat arrays.

        Returns:
            New arrays, or the very list that was given if nothing was mixed.
        """
        live, _ = self._look_around()
        parts = self._show(Model(step, values))
        there = self._partners.present(
            c for c in self._candidates if c in live or c == self._worker
        )
        partner = there[gossip.drawn(self._random, len(there))]
        is_self = partner == self._worker
        self._count(exchanges=1, with_itself=is_self)
        if self._mode == "pull":
            return values if is_self else self._pull(partner, step, values)
        if not is_self and not self._partners.push(partner, self._models, parts):
            self._count(failed=1)
        pushed = self._server.take_pushed()
        if not pushed.count:
            return values
        mixed = [
            gossip.pushed(value, inbox, is_self)
            for value, inbox in zip(values, pushed.inboxes, strict=True)
        ]
        self._count(mixed=pushed.count)
        return mixed

    def average(
        self, step: int, values: list[np.ndarray], in_step: bool = False
    ) -> list[np.ndarray]:
        """Returns the mean of all models of this training that workers show, this one's included.

        Args:
            step: How many steps this worker has taken.
            values: Its model as flat arrays.
            in_step: Whether it takes a step just now. Then its model counts as it was shown last.
        """
        live, done = self._look_around()
        own = self._models.read(self._shown) if in_step else None
        if own is None:
            own = Model(step, values)
            self._show(own)
        total = [np.zeros(v.size) for v in values]
        count = 0
        # In the same order on all workers, so that they see the same bits.
        for worker in sorted(self._partners.present({*live, *done, self._worker})):
            model = own
            if worker != self._worker:
                model = self._partners.pull(worker, self._models)
            if model is not None:
                count += 1
                for t, v in zip(total, model.values, strict=True):
                    t += v
        return [(t / count).astype(v.dtype) for t, v in zip(total, values, strict=True)]

    # How.

    def _show(self, model: Model) -> Sequence[bytes]:
        """Shows a model to the others; returns it as messages."""
        self._shown = self._server.publish(model)
        return self._shown

    def _look_around(self) -> tuple[Mapping[int, str], Mapping[int, str]]:
        live, done = self._addresses()
        self._partners.update({**done, **live})
        return live, done

    def _found(self, models: ModelFormat, is_first: bool, of_lower: bool) -> _Found:
        """Looks for the model of the worker that is furthest, perhaps only of those below."""
        live, done = self._look_around()
        found = []
        is_over = begins = False
        is_lowest = min(live, default=-1) == self._worker
        for worker in [*sorted(live), *sorted(done if is_first else ())]:
            if worker == self._worker or (worker > self._worker and of_lower):
                continue
            if found and worker not in live:
                # While anybody who takes part has a model, those that have ended are not asked.
                break
            reply = self._partners.greet(worker) if self._partners.present([worker]) else None
            # A process that comes again must not begin anew because the others are busy.
            begins = begins or (reply is None and is_first)
            if reply is None or not reply.variables:
                continue
            key = (reply.fit, reply.revision)
            if key == models.key:
                models.compare(reply)
            is_over = is_over or key > models.key
            if key == models.key and worker < self._worker and not reply.has_model:
                begins = True
            if reply.has_model and models.has_variables_of(reply):
                if is_first or key == models.key:
                    found.append((key, reply.step, -worker))
        for key, _, lower in sorted(found, reverse=True):
            worker = -lower
            alike = models if key == models.key else models.of_training(key)
            model = self._partners.pull(worker, alike)
            if model is not None:
                return _Found(alike, model, is_over, begins, False, is_lowest)
        is_late = is_first and 0 in done and not live.keys() - {self._worker}
        return _Found(models, None, is_over, begins, is_late, is_lowest)

    def _pull(self, partner: int, step: int, values: list[np.ndarray]) -> list[np.ndarray]:
        model = self._partners.pull(partner, self._models)
        if model is None:
            # It may be there and have no model to show yet, which is no failure.
            self._count(failed=partner not in self._partners.present([partner]))
            return values
        behind = abs(step - model.step)
        self._count(mixed=1, staleness_sum=behind)
        self.counts = self.counts._replace(staleness_max=max(self.counts.staleness_max, behind))
        return [gossip.pulled(v, [other]) for v, other in zip(values, model.values, strict=True)]

    def _count(self, **more: int) -> None:
        counts = self.counts
        self.counts = counts._replace(**{n: getattr(counts, n) + int(v) for n, v in more.items()})


def distance(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Returns the root mean square of the differences between two models.

    Args:
        one: Flat arrays.
        other: As many, of the same sizes.
    """
    size = sum(v.size for v in one)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = sum(
            float(np.sum(np.square(a - b, dtype=np.float64)))
            for a, b in zip(one, other, strict=True)
        )
    return float(np.sqrt(squares / size)) if size else 0.0
