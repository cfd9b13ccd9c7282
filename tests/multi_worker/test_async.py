"""AsyncStrategy: steps are added to common parameters as they come, in real processes."""

from collections.abc import Iterator

import numpy as np
import pytest

from tf_syncdist.mixing import parameter_server
from tf_syncdist.mixing.parameter_server import Served

from . import mixing_checks as checks
from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(300)

JOBS = {
    "all": {"ps": 1, **checks.job("async", parts=["keras", "loops", "straggler", "memory"])},
    "bounded": {"ps": 1, **checks.job("async", max_staleness=1)},
}


class Server:
    """The rule of the digest's b2, with any optimizer."""

    def __init__(self, model: np.ndarray, max_staleness: int | None) -> None:
        self._served = Served(model)
        self._bound = max_staleness
        self._pulled: dict[int, Served] = {}
        self.staleness: dict[int, list[int]] = {0: [], 1: []}
        self.left_out = {0: 0, 1: 0}

    @property
    def end(self) -> np.ndarray:
        """See `Rule`."""
        return self._served.model

    def run(self, worker: int, step: object, drew_itself: bool) -> tuple[np.ndarray, np.ndarray]:
        """See `Rule`."""
        pulled = self._pulled.setdefault(worker, self._served)
        stepped = pulled.model + step(pulled.model)
        self.staleness[worker].append(parameter_server.staleness(self._served, pulled.version))
        if parameter_server.accepts(self._served, pulled.version, self._bound):
            pushed = parameter_server.difference(stepped, pulled.model)
            self._served = parameter_server.pushed(self._served, pushed)
        else:
            self.left_out[worker] += 1
        self._pulled[worker] = self._served
        return pulled.model, self._served.model


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with Jobs("mixing.py", tmp_path_factory, JOBS) as started:
        yield started


def rules(job: JobResult, max_staleness: int | None) -> list[Server]:
    """Returns the rule after each training, all of whose runs have followed it."""
    found = []

    def begin(model: np.ndarray) -> Server:
        found.append(Server(model, max_staleness))
        return found[-1]

    for part in ("fit", "loop"):
        checks.replay(job, part, begin)
    return found


@pytest.mark.parametrize(("name", "max_staleness"), [("all", None), ("bounded", 1)])
def test_workers_that_take_turns_follow_the_rule(
    jobs: Jobs, name: str, max_staleness: int | None
) -> None:
    trained = rules(jobs[name], max_staleness)
    assert any(rule.left_out[w] for rule in trained for w in (0, 1)) == (name == "bounded")
    for worker, report in enumerate(jobs[name].each("report")):
        left_out = sum(rule.left_out[worker] for rule in trained)
        staleness = [s for rule in trained for s in rule.staleness[worker]]
        mixed = [s for s in staleness if max_staleness is None or s <= max_staleness]
        assert report["own"]["exchanges"] == len(staleness)
        assert report["own"]["too_stale"] == left_out
        assert report["own"]["mixed"] == len(staleness) - left_out
        assert report["own"]["staleness_max"] == max(mixed)
        assert report["own"]["staleness_sum"] == sum(mixed)
        counted = report["workers"][worker]
        assert (counted["mixed"], counted["too_stale"]) == (len(staleness) - left_out, left_out)
        assert 0 < report["centre_bytes"] <= 4 * 4


def test_what_is_outside_of_training_sees_the_current_parameters(jobs: Jobs) -> None:
    checks.check_keras(jobs["all"], steps=90)


def test_custom_loops(jobs: Jobs) -> None:
    checks.check_loops(jobs["all"])


def test_nobody_waits(jobs: Jobs) -> None:
    checks.check_nobody_waited(jobs["all"])


def test_the_service_keeps_little_besides_the_parameters(jobs: Jobs) -> None:
    checks.check_memory(jobs["all"], services=1)


def test_the_report_says_what_was_left_out(jobs: Jobs) -> None:
    text = jobs["bounded"].each("report_text")[1]
    assert "left out as too stale" in text and "staleness" in text
