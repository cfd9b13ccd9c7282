"""With a backup worker nobody waits for the slow one, and all end with the same bits."""

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(260)

WORKERS = 3
SLOW = 2
FAST = (0, 1)
DELAY_SECONDS = 0.4
EPOCHS = 4  # Two, and of the second fit's five again two.
STEPS = 20
ROUNDS = EPOCHS * STEPS


@pytest.fixture(scope="module", params=[0, 1], ids=["no_ps_task", "ps_task"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    return run_job(
        "stragglers.py",
        tmp_path_factory.mktemp("stragglers"),
        workers=WORKERS,
        ps=request.param,
        ps_runs_program=True,
        arguments={"slow": SLOW, "delay_seconds": DELAY_SECONDS},
    )


def test_workers_end_with_the_same_bits(job: JobResult) -> None:
    job.common("weights_sha256")
    job.common("optimizer_sha256")
    # Those of batch normalisation are averaged at the end of each epoch.
    job.common("statistics_sha256")


def test_every_round_of_every_worker_is_counted(job: JobResult) -> None:
    for index, local in enumerate(job.each("local")):
        assert (local["worker"], local["num_workers"]) == (index, WORKERS)
        assert local["rounds"] == ROUNDS
        assert local["contributed"] + local["late"] + local["replayed"] == ROUNDS
        assert local["missed"] == 0
    slow = job.results[SLOW]["local"]
    assert slow["late"] + slow["replayed"] > ROUNDS / 2
    assert sum(local["contributed"] for local in job.each("local")) == 2 * ROUNDS


def test_the_report_agrees_with_each_worker(job: JobResult) -> None:
    report = job.common("report")
    assert report["rounds"] == ROUNDS
    for reported, local in zip(report["workers"], job.each("local"), strict=True):
        for name in ("worker", "contributed", "late", "replayed", "missed"):
            assert reported[name] == local[name]


def test_the_chief_prints_the_report(job: JobResult) -> None:
    text = job.common("report_text")
    assert f"worker {SLOW} was late in" in text
    assert text in job.logs["worker 0"]
    assert not any("was late in" in job.logs[f"worker {w}"] for w in (1, 2))


def test_fast_workers_do_not_wait(job: JobResult) -> None:
    for worker in FAST:
        # The median of its rounds, of which a stalled machine delays few.
        assert job.results[worker]["typical_seconds"] < DELAY_SECONDS / 2


def test_the_slow_worker_ends_soon_after_the_others(job: JobResult) -> None:
    ends = [job.ended[f"worker {w}"] for w in range(WORKERS)]
    # With all its own steps it would take more than 30 s longer.
    assert max(ends) - min(ends) < 25


def test_the_logs_of_epochs_are_the_same_everywhere(job: JobResult) -> None:
    first, second = job.common("histories")
    for history in (first, second):
        assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
        assert [len(v) for v in history.values()] == [2] * 4
    assert second["val_loss"][-1] < first["val_loss"][0]


def test_every_epoch_has_the_announced_number_of_batches(job: JobResult) -> None:
    assert job.common("announced") == [STEPS] * EPOCHS
    assert job.common("seen") == [STEPS] * EPOCHS


def test_one_worker_alone_evaluates_and_predicts_everything(job: JobResult) -> None:
    worker = job.results[1]
    assert worker["evaluated"]["loss"] == pytest.approx(worker["full_loss"], rel=1e-4)
    assert worker["evaluated"]["accuracy"] == pytest.approx(worker["full_accuracy"], rel=1e-4)
    assert worker["predicted_shape"] == [630, 4]
    assert worker["predicted_difference"] < 1e-5
    # The last epoch's validation has read everything too, with the weights of its end.
    (history,) = job.common("histories")[1:]
    assert history["val_loss"][-1] == pytest.approx(worker["full_loss"], rel=1e-4)


def test_the_chief_alone_saves_a_model_that_loads(job: JobResult) -> None:
    assert job.results[0]["loaded_difference"] < 1e-5


def test_logs_have_no_warnings_and_one_progress_bar(job: JobResult) -> None:
    for task, log in job.logs.items():
        # What TensorFlow's C++ code prints when it is imported cannot be turned off.
        lines = [line for line in log.splitlines() if "absl::InitializeLog" not in line]
        assert [line for line in lines if "warning" in line.lower()] == [], task
        assert "out of data" not in log, task
        assert (f"{STEPS}/{STEPS}" in log) == (task == "worker 0"), task
