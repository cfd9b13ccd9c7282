"""ElasticAveragingStrategy: workers and a centre, in real processes."""

from collections.abc import Iterator

import numpy as np
import pytest

from tf_syncdist.mixing import elastic

from . import mixing_checks as checks
from .harness import Jobs

pytestmark = pytest.mark.timeout(300)

RATE = 0.3
JOBS = {
    "all": {
        "ps": 2,
        **checks.job("elastic", parts=["keras", "loops", "straggler", "memory"], moving_rate=RATE),
    },
    "period": checks.job("elastic", period=2),
}


class Elastic:
    """The rule of the digest's b3, with any optimizer."""

    def __init__(self, centre: np.ndarray, rate: float, period: int, runs: list[int]) -> None:
        self.end = centre
        self._rate, self._period = np.float32(rate), period
        self._runs = list(runs)
        self._models: dict[int, np.ndarray] = {}

    def run(self, worker: int, step: object, drew_itself: bool) -> tuple[np.ndarray, np.ndarray]:
        """See `Rule`."""
        # Who begins later begins with the centre.
        before = self._models.setdefault(worker, self.end)
        is_due = self._runs[worker] % self._period == 0
        self._runs[worker] += 1
        model = before
        if is_due:
            model, self.end = elastic.exchanged(before, self.end, self._rate)
        self._models[worker] = model + step(before)
        return before, self.end


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with Jobs("mixing.py", tmp_path_factory, JOBS) as started:
        yield started


@pytest.mark.parametrize("part", ["fit", "loop"])
@pytest.mark.parametrize(("name", "rate", "period"), [("all", RATE, 1), ("period", 0.4, 2)])
def test_workers_that_take_turns_follow_the_rule(
    jobs: Jobs, name: str, rate: float, period: int, part: str
) -> None:
    # Runs are counted over all that a worker trains.
    runs = [0, 0] if part == "fit" else [checks.TWO.count(w) for w in range(2)]
    checks.replay(jobs[name], part, lambda start: Elastic(start, rate, period, runs))


def test_what_is_outside_of_training_sees_the_centre(jobs: Jobs) -> None:
    checks.check_keras(jobs["all"], steps=90)


def test_custom_loops(jobs: Jobs) -> None:
    checks.check_loops(jobs["all"])
    # Distances are those from the centre of now, whoever has looked at it last.
    for before, after in jobs["all"].each("loop", "distances"):
        assert before == after and before[0] > 0


def test_nobody_waits(jobs: Jobs) -> None:
    checks.check_nobody_waited(jobs["all"])


def test_the_services_keep_little_besides_the_centre(jobs: Jobs) -> None:
    checks.check_memory(jobs["all"], services=2)


def test_the_report_counts_exchanges(jobs: Jobs) -> None:
    for name, period in (("all", 1), ("period", 2)):
        for worker, report in enumerate(jobs[name].each("report")):
            runs = 2 * checks.TWO.count(worker)
            assert report["runs"] == runs
            expected = sum(run % period == 0 for run in range(runs))
            assert report["own"]["exchanges"] == report["own"]["mixed"] == expected
            assert report["workers"][worker]["mixed"] == expected
            # Nothing but the centre, which may be spread over two services.
            assert 0 < report["centre_bytes"] <= 4 * 4
            assert report["distance"] > 0
