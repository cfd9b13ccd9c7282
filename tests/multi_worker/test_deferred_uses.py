"""Whoever looks at a variable whose update waits for the next run sees it updated."""

import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(260)

# As in the program: a weight begins with 0 and loses so much in each step.
RATE = 0.5
STEPS = 8
AFTER = [-RATE * (step + 1) for step in range(STEPS)]
LAST = AFTER[-1]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    return run_job("deferred_uses.py", tmp_path_factory.mktemp("uses"), workers=2)


@pytest.mark.parametrize(
    "case", ["get_weights", "slots", "saved", "checkpoint", "eagerly", "without_exchange"]
)
def test_after_every_run_the_update_is_seen(case: str, job: JobResult) -> None:
    """And it was not made before somebody looked."""
    assert job.common(case) == [[value, True] for value in AFTER]


def test_an_optimizer_counts_its_updates_with_the_runs(job: JobResult) -> None:
    assert job.common("counts") == list(range(1, STEPS + 1))


def test_what_keras_evaluates_has_all_updates(job: JobResult) -> None:
    features = 6
    ends = [LAST * epochs for epochs in (1, 2, 3)]
    assert job.common("val_loss") == [end * features for end in ends]
    assert job.common("evaluated") == [[ends[-1], False]]


def test_one_worker_alone_may_look(job: JobResult) -> None:
    assert job.results[1]["on_one_worker"] == [[value, True] for value in AFTER]
    assert job.results[0]["on_one_worker"] == [[LAST, True]]


def test_what_is_written_between_runs_is_not_updated_once_more(job: JobResult) -> None:
    loaded, steps_after = 100.0, 2
    assert job.common("set_weights") == [[loaded - RATE * steps_after, True]]


def test_after_an_error_of_a_callback_no_update_is_lost(job: JobResult) -> None:
    assert job.common("exception") == [[AFTER[4], True], [AFTER[4] + LAST, False]]


def test_models_that_are_trained_in_turn_are_updated_in_turn(job: JobResult) -> None:
    assert job.common("two_models") == [[AFTER[STEPS // 2 - 1], True]] * 2


def test_all_stop_after_the_same_run_with_its_update_made(job: JobResult) -> None:
    assert 3 <= job.common("stopped_after") < STEPS * 10
    assert job.common("early_stopping_after") == 2 * STEPS
    # As if there had been `STEPS` runs.
    for case in ("stopped", "early_stopping"):
        assert job.common(case) == [[LAST, False]]


def test_input_of_unknown_length_ends_for_all_alike(job: JobResult) -> None:
    """Where it ends is found from what workers have finished, so no update waits."""
    assert job.common("unknown_length") == job.common("generator") == [[LAST, False]]
    assert job.common("unknown_waits") == [False] * 2 * STEPS


def test_after_such_input_updates_wait_again_and_workers_are_waited_for(job: JobResult) -> None:
    assert job.common("after_unknown_length") == [[-RATE, True]] * 2
    assert job.common("late") == 0


def test_where_a_function_reads_a_variable_updates_wait_no_longer(job: JobResult) -> None:
    """The update that was waiting is made once, and not by the function whenever it is called."""
    third, *others = job.common("in_function")
    assert third == [AFTER[2], True]
    assert others == [[value, False] for value in AFTER[2:] for _ in range(2)][1:]


def test_that_is_said_once(job: JobResult) -> None:
    for worker in (0, 1):
        lines = job.logs[f"worker {worker}"].splitlines()
        said = [line for line in lines if "updates are made" in line or "the update of" in line]
        assert len(said) == (worker == 0), said
        # It comes with the last case, and not with any that looks from outside.
        if said:
            assert "at the end of each run, not in the next one: a tf.function uses" in said[0]
            assert lines.index("begins: in_function") < lines.index(said[0])
