"""Input of unknown, uneven or no length ends at the same run everywhere, and is read as asked."""

from collections.abc import Iterator
from typing import Any

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(560)

WORKERS = 3
SLOW = 2
KNOWN = 10  # Batches of 12 in 120 examples.
UNKNOWN = 9  # And in 100 examples, the last one smaller.


@pytest.fixture(scope="module", params=[0, 1], ids=["all_needed", "one_backup"])
def backup_workers(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {
        f"backup_{b}": {
            "workers": WORKERS,
            "arguments": {
                "backup_workers": b,
                "slow": SLOW,
                "pause_seconds": 0.08 * b,
                "read_seconds": 0.2 * b,
            },
        }
        for b in (0, 1)
    }
    with Jobs("endings.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def job(backup_workers: int, jobs: Jobs) -> JobResult:
    return jobs[f"backup_{backup_workers}"]


CASES = (
    "unknown",
    "several_steps",
    "no_length",
    "own_shares",
    "files",
    "dealt",
    "off",
    "off_known",
    "slow_to_read",
)


@pytest.mark.parametrize("case", CASES)
def test_all_workers_end_alike(job: JobResult, case: str) -> None:
    for name in ("weights_sha256", "optimizer_sha256", "rounds", "seen"):
        job.common(case, name)


@pytest.mark.parametrize("case", [c for c in CASES if c != "own_shares"])
def test_the_logs_are_the_same_everywhere(job: JobResult, case: str) -> None:
    history = job.common(case, "history")
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize(
    ("case", "steps"), [("no_length", 7), ("dealt", KNOWN), ("off_known", KNOWN)]
)
def test_an_epoch_of_known_length_has_it(job: JobResult, case: str, steps: int) -> None:
    assert job.common(case, "seen") == [steps] * 3
    assert job.common(case, "rounds") == 3 * steps


@pytest.mark.parametrize("case", ["unknown", "several_steps"])
def test_an_epoch_of_unknown_length_is_one_pass(
    job: JobResult, backup_workers: int, case: str
) -> None:
    rounds = job.common(case, "rounds")
    # A worker that was behind may be in a round already when the others find the end.
    assert 3 * UNKNOWN <= rounds <= 3 * (UNKNOWN + backup_workers)
    if case == "unknown":
        assert sum(job.common(case, "seen")) == rounds


def test_uneven_shares_end_when_too_few_workers_have_input(
    job: JobResult, backup_workers: int
) -> None:
    seen = job.common("own_shares", "seen")
    assert sum(seen) == job.common("own_shares", "rounds")
    # Of 5, 7 and 6 batches; who has begun the next round when the first worker is out takes it to
    # its end.
    least, most = [(5, 6), (6, 10)][backup_workers]
    assert all(least <= n <= most for n in seen)
    # A loop in a graph reads ahead of the run in progress, perhaps beyond the common end.
    rounds = job.common("own_shares", "looped_rounds")
    assert least <= rounds <= most
    assert all(looped - rounds in (0, 1) for looped in job.each("own_shares", "looped"))


def test_every_worker_reads_its_own_files(job: JobResult) -> None:
    shares = [set(result["distinct"]) for result in job.each("files")]
    assert all(shares)
    for index, share in enumerate(shares):
        assert all(share.isdisjoint(other) for other in shares[:index])
    files = [{number // 100 for number in share} for share in shares]
    assert sorted(map(len, files)) == [2, 2, 2]


def test_what_is_not_sharded_is_read_by_every_worker(job: JobResult, backup_workers: int) -> None:
    _check_read(job, "off", 60, 12 // (WORKERS - backup_workers))


def test_epochs_of_what_is_not_sharded_go_on_where_the_last_one_ended(
    job: JobResult, backup_workers: int
) -> None:
    # An epoch needs 10 pieces of 4 or 6 examples from each worker.
    piece = 12 // (WORKERS - backup_workers)
    _check_read(job, "off_known", min(120, 3 * KNOWN * piece), piece)


def _check_read(job: JobResult, case: str, count: int, piece: int) -> None:
    """Checks that each worker has read so many examples, but for those of its replays."""
    for result in job.each(case):
        missing = set(range(count)) - set(result["distinct"])
        assert len(missing) <= piece * (result["rounds"] - result["contributed"])


def test_a_worker_that_is_behind_does_not_read(job: JobResult, backup_workers: int) -> None:
    results: dict[int, dict[str, Any]] = dict(enumerate(job.each("slow_to_read")))
    assert results[0]["rounds"] == 60
    if backup_workers:
        assert results[SLOW]["read"] < 60 / 2 < results[0]["read"]
    else:
        assert results[SLOW]["read"] >= 60
