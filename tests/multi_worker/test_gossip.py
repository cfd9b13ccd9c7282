"""GossipStrategy: workers average their models with partners', in real processes."""

from collections.abc import Iterator

import numpy as np
import pytest

from tf_syncdist.mixing import gossip

from . import mixing_checks as checks
from .harness import Jobs
from .test_security import OPTIONS

pytestmark = pytest.mark.timeout(300)

# Each draws itself or the next one.
RING = [[0, 1], [1, 2], [2, 0]]
# A partner may have no turn for long, and the rule is that of one that answers.
PATIENCE = {"partner_timeout_seconds": 60.0}
JOBS = {
    "all": {
        "ps": 1,
        **checks.job("gossip", 3, ["keras", "loops", "straggler"], partners=RING, **PATIENCE),
    },
    "push": checks.job("gossip", mode="push", **OPTIONS, **PATIENCE),
}


class Pull:
    """The rule of the digest's b4.

    Args:
        model: With which all begin.
        looks: Whether the worker whose turn it was shows its model again afterwards.
    """

    def __init__(self, model: np.ndarray, looks: bool) -> None:
        self._start = model
        self._looks = looks
        self._models: dict[int, np.ndarray] = {}
        self._shown: dict[int, np.ndarray] = {}
        self._steps: dict[int, int] = {}

    @property
    def end(self) -> np.ndarray:
        """See `Rule`."""
        return np.mean(list(self._models.values()), axis=0)

    def run(self, worker: int, step: object, drew_itself: bool) -> tuple[np.ndarray, np.ndarray]:
        """See `Rule`."""
        before = self._begun(worker)
        model = before + step(before)
        self._shown[worker] = model
        self._steps[worker] = self._steps.get(worker, 0) + 1
        partner = (worker + 1) % 3
        if not drew_itself and partner in self._shown:
            model = gossip.pulled(model, [self._shown[partner]])
        self._models[worker] = model
        if self._looks:
            self._shown[worker] = model
        return before, np.mean(list(self._shown.values()), axis=0)

    def _begun(self, worker: int) -> np.ndarray:
        """Returns a worker's model; one that begins has that of the worker that is furthest."""
        if worker not in self._models:
            furthest = max(self._steps, key=lambda w: (self._steps[w], w), default=None)
            self._models[worker] = self._start if furthest is None else self._shown[furthest]
        return self._models[worker]


class Push:
    """The rule of the digest's b5, for two workers."""

    def __init__(self, model: np.ndarray, looks: bool) -> None:
        self._pull = Pull(model, looks)
        self._inboxes: dict[int, gossip.Inbox] = {}

    @property
    def end(self) -> np.ndarray:
        """See `Rule`."""
        return self._pull.end

    def run(self, worker: int, step: object, drew_itself: bool) -> tuple[np.ndarray, np.ndarray]:
        """See `Rule`."""
        pull = self._pull
        before = pull._begun(worker)
        inbox = self._inboxes.setdefault(worker, gossip.Inbox())
        model = before + step(before)
        pull._shown[worker] = model
        pull._steps[worker] = pull._steps.get(worker, 0) + 1
        # Who has not begun takes none.
        if not drew_itself and 1 - worker in self._inboxes:
            self._inboxes[1 - worker] = gossip.received(self._inboxes[1 - worker], model)
        model = gossip.pushed(model, inbox, drew_itself)
        self._inboxes[worker] = gossip.Inbox()
        pull._models[worker] = model
        if pull._looks:
            pull._shown[worker] = model
        return before, np.mean(list(pull._shown.values()), axis=0)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with Jobs("mixing.py", tmp_path_factory, JOBS) as started:
        yield started


@pytest.mark.parametrize("part", ["fit", "loop"])
@pytest.mark.parametrize(("name", "rule", "workers"), [("all", Pull, 3), ("push", Push, 2)])
def test_workers_that_take_turns_follow_the_rule(
    jobs: Jobs, name: str, rule: type, workers: int, part: str
) -> None:
    checks.replay(jobs[name], part, lambda start: rule(start, part == "fit"), workers)


def test_what_is_outside_of_training_sees_the_mean(jobs: Jobs) -> None:
    checks.check_keras(jobs["all"], steps=60)


def test_custom_loops(jobs: Jobs) -> None:
    checks.check_loops(jobs["all"])


def test_nobody_waits(jobs: Jobs) -> None:
    checks.check_nobody_waited(jobs["all"])


def test_the_report_counts_draws(jobs: Jobs) -> None:
    for name, turns in (("all", checks.THREE), ("push", checks.TWO)):
        for worker, report in enumerate(jobs[name].each("report")):
            own = report["own"]
            assert own["exchanges"] == report["runs"] == 2 * turns.count(worker)
            assert own["with_itself"] <= own["exchanges"] and own["failed"] == 0
            assert report["centre_bytes"] == 0 and report["workers"] == []
        # One worker alone may draw itself, or another one, every time.
        all_own = jobs[name].each("report", "own")
        assert 0 < sum(own["with_itself"] for own in all_own) < 2 * len(turns)
        assert sum(own["mixed"] for own in all_own) > 0
