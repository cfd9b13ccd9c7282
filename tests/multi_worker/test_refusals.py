"""What cannot work with several workers is refused on each of them, with the way out."""

import re
from collections.abc import Iterator

import pytest

from .harness import JobResult, Jobs

pytestmark = pytest.mark.timeout(260)

# Mistake: the kind of its error, and what the message has to say.
MISTAKES = {
    "jit_compile": ("ValueError", r"jit_compile=True.*jit_compile=False"),
    "jit_compile_on_batch": ("ValueError", r"jit_compile=True.*jit_compile=False"),
    "jit_compile_in_loop": ("ValueError", r"tf\.function\(jit_compile=True\).*jit_compile out"),
    "model_outside": ("ValueError", r"built outside of any scope.*with strategy\.scope\(\):"),
    "model_outside_on_batch": ("ValueError", r"outside of any scope.*with strategy\.scope\(\):"),
    "fit_within_scope_only": (
        "ValueError",
        r"Received: '[^']+', which was made outside.*with strategy\.scope\(\):",
    ),
    "compiled_outside": (
        "ValueError",
        r"Received: 'sgd[^']*/iteration', which was made outside.*with strategy\.scope\(\):",
    ),
    "optimizer_outside": (
        "ValueError",
        r"Received: 'adam[^']*/iteration', which was made outside.*with strategy\.scope\(\):",
    ),
    "all_gather": ("NotImplementedError", r"no `all_gather`.*Use `all_reduce`"),
    "tensor_array": ("TypeError", r"dtype variant.*Do not return TensorArrays"),
    "variant": ("TypeError", r"dtype variant.*Do not return TensorArrays"),
    "batch_size": ("ValueError", r"divisible by N.*batch_size=9 with N=2.*Use 8 or 10"),
    "shares_evaluated": ("ValueError", r"`x` of `evaluate`.*each worker has a share"),
    "shares_as_validation": ("ValueError", r"`validation_data` of `fit`.*each worker has a share"),
    "batch_of_dataset": ("ValueError", r"divisible by N.*batch_size=9 with N=2.*Use 8 or 10"),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    unequal = {"program": "unequal_exchanges.py", "workers": 2}
    wanted = {
        # First that in which worker 1 waits long for a service that has gone with worker 0.
        "unequal_1": unequal | {"arguments": {"twice": 1}},
        "refusals": {"workers": 2},
        "unequal_0": unequal | {"arguments": {"twice": 0}},
    }
    with Jobs("refusals.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def job(jobs: Jobs) -> JobResult:
    return jobs["refusals"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_the_way_out(job: JobResult, name: str) -> None:
    kind, pattern = MISTAKES[name]
    for found in job.each(name):
        assert kind in found["kinds"], found
        assert re.search(pattern, found["message"], re.DOTALL), found["message"]


def test_validation_may_have_batches_of_any_size(job: JobResult) -> None:
    assert job.common("batch_of_validation")["kinds"] == []


def test_training_goes_on_after_refusals(job: JobResult) -> None:
    assert len(job.common("goes_on", "loss")) == 2
    job.common("goes_on", "weights_sha256")


def test_a_model_of_another_strategy_is_trained_by_each_worker_alone(job: JobResult) -> None:
    assert job.common("alone") == 1


@pytest.mark.parametrize("twice", [0, 1])
def test_an_unequal_number_of_exchanges_is_refused(jobs: Jobs, twice: int) -> None:
    job = jobs[f"unequal_{twice}"]
    # Whose message the service sees first decides which worker is refused; the other one goes on
    # alone, unless the service has gone with worker 0.
    told = [e for e in job.each("error") if "Every worker must" in e]
    assert told, job.each("error")
    assert all(re.search(r"Expected .*\d.* in run 0", error) for error in told), told
