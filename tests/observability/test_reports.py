"""The lines of a report."""

from tf_syncdist.observability.reports import CutoffReport, Report, WorkerReport


def test_every_worker_has_a_line_that_says_how_it_did() -> None:
    report = Report(
        120,
        (
            WorkerReport(0, 120, 0, 0, 0, 0, 0.001),
            WorkerReport(1, 119, 1, 1, 0, 0, 0.012),
            WorkerReport(2, 89, 3, 0, 28, 0, 0.160),
            WorkerReport(3, 7, 0, 0, 0, 0, 0.012),
        ),
    )
    assert str(report).splitlines() == [
        "120 rounds with 4 workers",
        "worker 0 was in time in all 120 rounds, 11 ms ahead of the median",
        "worker 1 was late in 1 of 120 rounds, at the median",
        "worker 2 was late in 31 of 120 rounds (28 of them replayed without computing), "
        "148 ms behind the median",
        "worker 3 was in time in 7 of 120 rounds and absent from 113, at the median",
    ]


def test_rounds_that_values_were_kept_back_from_are_told_if_there_are_any() -> None:
    report = Report(
        20,
        (
            WorkerReport(0, 20, 0, 0, 0, 0, 0.0, nonfinite=0),
            WorkerReport(1, 17, 3, 0, 0, 0, 0.0, nonfinite=3),
        ),
    )
    assert str(report).splitlines() == [
        "20 rounds with 2 workers",
        "worker 0 was in time in all 20 rounds, at the median",
        "worker 1 was late in 3 of 20 rounds, kept back gradients with NaN or Inf in 3, "
        "at the median",
    ]


def test_a_single_worker_has_no_rounds_with_others() -> None:
    assert str(Report(0, ())) == "0 rounds by a single worker"


def test_what_was_refused_has_a_line_of_its_own() -> None:
    workers = (WorkerReport(0, 2, 0, 0, 0, 0, 0.0),)
    refused = {"stream too many": 3, "call without the job's token": 12}
    assert str(Report(2, workers, refused)).splitlines()[1:] == [
        "worker 0 was in time in all 2 rounds, at the median",
        "the service refused 15 times: 12 x call without the job's token, 3 x stream too many",
    ]
    assert len(str(Report(2, workers)).splitlines()) == 2


def test_what_a_cutoff_policy_has_chosen_is_a_line() -> None:
    workers = (WorkerReport(0, 20, 0, 0, 0, 0, 0.0), WorkerReport(1, 17, 3, 0, 0, 0, 0.0))
    told = CutoffReport("Deadline(seconds=1)", 20, 1.85, 1, 2, 0.5, None, "", "")
    *_, line = str(Report(20, workers, cutoff=told)).splitlines()
    assert line == (
        "Deadline(seconds=1) closed the last 20 rounds with 1 to 2 of 2 contributions "
        "(mean 1.9), after 0.5 s"
    )
    told = told._replace(expected_seconds=0.4567, reason="of the test", failure="it broke")
    *_, line = str(Report(20, workers, cutoff=told)).splitlines()
    assert line.endswith(
        "after 0.5 s where 0.457 s were expected; of the test; then full sync, because it broke"
    )
    *_, line = str(Report(0, workers, cutoff=told._replace(rounds=0, failure=""))).splitlines()
    assert line == "Deadline(seconds=1) has not closed a round yet"
