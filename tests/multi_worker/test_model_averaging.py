"""Model averaging on several workers: learners of all of them follow the pure rule."""

from collections.abc import Iterator
from typing import Any

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(400)

BATCHES = 11
# Distances are over all models that learners have trained, so the first one is looked at.
ALL = ("outside", "sgd", "dropping", "statistics", "averages", "without_metrics")
ALL += ("given", "loops", "waiting", "refused", "report")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    # Each learner has a device of its own; averaged more rarely, and not as far.
    rule = {"central_momentum": 0.5, "correction": 0.2, "period": 2}
    on_devices = {"learners": 1, "devices": 2, "rule": rule, "cases": ("sgd", "dropping", "report")}
    alone = {"learners": 2, "devices": 2, "cases": ("sgd", "loops", "statistics")}
    # What was traced to measure must not be used later, which in a graph is another function.
    auto = {"learners": "auto", "run_eagerly": True, "cases": ("sgd", "report")}
    wanted = {
        "together": {"workers": 2, "arguments": {"learners": 2, "cases": ALL}},
        "on_devices": {"workers": 2, "ps": 1, "arguments": on_devices},
        "auto": {"workers": 2, "arguments": auto},
        "alone_on_devices": {"workers": 0, "arguments": alone},
    }
    with Jobs("averaging.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def together(jobs: Jobs) -> JobResult:
    return jobs["together"]


@pytest.mark.parametrize("case", ["sgd", "dropping"])
@pytest.mark.parametrize("job", ["together", "on_devices"])
def test_learners_of_two_workers_follow_the_rule(jobs: Jobs, job: str, case: str) -> None:
    assert jobs[job].common("learners") == 4
    for found in jobs[job].each(case):
        check_trajectory(found, 4)
        if (job, case) == ("on_devices", "sgd"):
            assert found["apart"] < 1e-5
    jobs[job].common(case, "weights_sha256")


def test_learners_on_two_devices_of_one_process_follow_the_rule(jobs: Jobs) -> None:
    (found,) = jobs["alone_on_devices"].each()
    assert found["learners"] == 4
    check_trajectory(found["sgd"], 4)
    assert found["sgd"]["apart"] < 1e-5
    assert found["statistics"]["own"] < 1e-5
    for loop in ("graph", "eager", "from_function"):
        assert found["loops"][loop]["difference"] < 1e-5
        assert found["loops"][loop]["runs"] == 3


def test_workers_agree_on_how_many_learners_they_have(jobs: Jobs) -> None:
    job = jobs["auto"]
    learners = job.common("sgd", "learners")
    assert learners % 2 == 0 and learners >= 2
    # Nothing is left of what was trained to measure.
    for found in job.each("sgd"):
        check_trajectory(found, learners)
    job.common("sgd", "weights_sha256")
    assert job.common("report", "averaged") == job.common("sgd", "runs")
    table = job.logs["worker 0"].partition("learners per device\n")[2].splitlines()
    assert table[0].split() == ["learners", "examples/s", "gain"]
    (kept,) = [line.split()[0] for line in table if line.endswith("<- kept")]
    assert int(kept) == learners // 2
    assert "learners per device" not in job.logs["worker 1"]


def check_trajectory(found: dict[str, Any], learners: int) -> None:
    # What is summed per worker first is rounded otherwise.
    assert found["difference"] < 1e-5
    assert found["moved"] > 0.01
    # An epoch is one pass over the data, and Keras knows how many runs that is.
    runs = -(-BATCHES // learners)
    assert found["runs"] == found["iterations"] == 2 * runs and found["announced"] == runs
    assert found["complaints"] == []


def test_each_worker_sees_the_central_model(together: JobResult) -> None:
    for found in together.each("outside"):
        assert found["get_weights"] == found["save"] == 0.0
        assert found["evaluate"] < 1e-5 and found["predict"] < 1e-5
        # Learners are elsewhere, and looking at the model leaves them there.
        assert min(found["apart"]) > 1e-4
        assert found["apart"] == found["apart_before"]


def test_what_a_worker_writes_its_learners_take_over(together: JobResult) -> None:
    for found in together.each("outside"):
        assert found["after_set_weights"] == [0.0, 0.0]
        assert found["from_worker_0"] < 1e-6
    assert "worker 1 differs from worker 0" in together.logs["worker 1"]


def test_statistics_are_averaged_over_learners_and_after_an_epoch_over_workers(
    together: JobResult,
) -> None:
    for found in together.each("statistics"):
        assert found["own"] < 1e-5
        assert found["at_the_end"] < 1e-5
    together.common("statistics", "sha256")
    # Metrics are over all learners of all workers.
    assert together.common("statistics", "logs").keys() == {"loss", "mae"}


def test_statistics_are_averaged_also_where_no_metric_is_read(together: JobResult) -> None:
    for where in ("callback", "validation"):
        first, second = together.common("without_metrics", where)
        assert first != second


def test_averages_over_time_are_averaged_over_learners_and_workers(together: JobResult) -> None:
    for found in together.each("averages"):
        assert found["difference"] < 1e-5
    together.common("averages", "weights_sha256")


def seen(found: dict[str, Any]) -> list[int]:
    return sorted(sum(found["seen"], []))


def test_workers_share_the_input(together: JobResult) -> None:
    for name, runs in {"arrays": 4, "dataset": 4, "whole": 2, "steps": 6, "unknown": 2}.items():
        assert together.common("given", name, "runs") == runs
        if name != "unknown":
            # Keras says so of all data whose length it does not know.
            assert together.common("given", name, "complaints") == []
        for found in together.each("given", name):
            assert len(found["seen"]) == 2 * runs
            assert {len(step) for step in found["seen"]} <= {8, 2}


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_an_epoch_is_one_pass_over_the_data(together: JobResult, kind: str) -> None:
    everything = sum((seen(found) for found in together.each("given", kind)), [])
    counts = [everything.count(i) for i in range(50)]
    assert sum(counts) == 4 * 4 * 8 and min(counts) >= 2


def test_a_batch_of_one_call_is_cut_for_all_learners(together: JobResult) -> None:
    batches = together.each("given", "train_on_batch")
    assert sorted(sum((b["seen"] for b in batches), [])) == [
        list(range(i, i + 4)) for i in (0, 4, 8, 12)
    ]


@pytest.mark.parametrize("kind", ["graph", "eager", "from_function"])
def test_custom_loops_follow_the_rule(together: JobResult, kind: str) -> None:
    for found in together.each("loops", kind):
        assert found["difference"] < 1e-5 and found["runs"] == 3


def test_a_slow_worker_is_waited_for(together: JobResult) -> None:
    for found in together.each("waiting"):
        assert found["seconds"] > 0.045
    together.common("waiting", "weights_sha256")


def test_a_report_says_how_often_learners_were_averaged(jobs: Jobs) -> None:
    for job in ("together", "on_devices"):
        for found in jobs[job].each("report"):
            assert found["staleness"] == 0
            assert found["learners"] == found["apart"] and len(found["learners"]) == 2
            assert found["text"].startswith(
                f"{found['runs']} runs by 2 workers with 2 learners each, averaged in "
            )
    runs = jobs["together"].common("report", "runs")
    assert jobs["together"].common("report", "averaged") == runs
    # While worker 1 takes over worker 0's model at the start of a fit, it is not waited for.
    first, second = jobs["together"].common("report", "mixed")
    assert first == runs and runs - 3 <= second <= runs
    runs = jobs["on_devices"].common("report", "runs")
    assert runs == 12 and jobs["on_devices"].common("report", "averaged") == 6
    assert jobs["on_devices"].common("report", "mixed") == [6, 6]
    # Worker 0 prints it at the end.
    assert "averaged in all of them without staleness" in jobs["together"].logs["worker 0"]
    assert "averaged in" not in jobs["together"].logs["worker 1"]


def test_what_several_workers_cannot_do_is_refused(together: JobResult) -> None:
    for found in together.each("refused"):
        assert "Received: jit_compile=True" in found["jit_compile"]
        assert "Received: one in a tf.function(jit_compile=True)" in found["jit_compile_in_loop"]
