"""What reports of strategies that mix models say."""

from tf_syncdist.observability.mixing_reports import averaging_report
from tf_syncdist.observability.reports import Report, WorkerReport


def test_one_learner_in_all_is_averaged_with_nobody() -> None:
    found = averaging_report(0, 1, 12, 0, 0.0, (0.0,), Report(12, ()))
    assert str(found) == "12 runs by a single worker with 1 learner"


def test_learners_of_one_worker() -> None:
    found = averaging_report(0, 1, 12, 4, 0.1, (0.01234, 0.02), Report(12, ()))
    assert str(found) == (
        "12 runs by a single worker with 2 learners, averaged in 4 of them without staleness\n"
        "learners of worker 0 are 0.0123 to 0.02 of the central model's length away from it"
    )
    assert found.own.exchanges == found.own.mixed == 4
    assert found.own.mean_staleness == 0 and found.workers == ()


def test_learners_of_several_workers_and_who_was_in_time() -> None:
    workers = (WorkerReport(0, 12, 0, 0, 0, 0, 0.0), WorkerReport(1, 10, 0, 0, 0, 0, 0.5))
    found = averaging_report(1, 2, 12, 12, 0.1, (0.5, 0.25), Report(12, workers))
    assert str(found).splitlines() == [
        "12 runs by 2 workers with 2 learners each, averaged in all of them without staleness",
        "12 rounds with 2 workers",
        "worker 0 was in time in all 12 rounds, 250 ms ahead of the median",
        "worker 1 was in time in 10 of 12 rounds and absent from 2, 250 ms behind the median",
        "learners of worker 1 are 0.25 to 0.5 of the central model's length away from it",
    ]
    assert [w.mixed for w in found.workers] == [12, 10]
