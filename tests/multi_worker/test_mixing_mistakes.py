"""Mistakes with the strategies in which nobody waits end in an error that tells what to do."""

import re
from collections.abc import Iterator

import pytest

from .harness import Jobs

pytestmark = pytest.mark.timeout(300)

JOBS = {
    "elastic": {"ps": 1, "workers": 2, "arguments": {"kind": "elastic"}},
    "gossip": {
        "ps": 1,
        "workers": 2,
        "arguments": {"kind": "gossip"},
        "environment": {"TF_SYNCDIST_TOKEN": "a-secret-of-the-test"},
    },
}
ARGUMENTS = {
    "period_0": r"`period`.*from 1.*Received: period=0\. Use 1",
    "period_half": r"`period`.*Received: period=1\.5",
    "moving_rate_0": r"`moving_rate` must be above 0 and below 1.*Received: moving_rate=0\.0",
    "moving_rate_1": r"`moving_rate`.*Received: moving_rate=1\.0",
    "moving_rate_text": r"`moving_rate`.*Received: moving_rate='fast'",
    "mode": r"`mode` must be one of \('pull', 'push'\)\. Received: mode='pool'",
    "partners_without_itself": r"worker itself.*partners=\[0\] on worker 1\. Add 1\.",
    "partners_out_of_range": r"workers from 0 to 1\. Received: partners=\[1, 2\]",
    "partners_negative": r"workers from 0 to 1\. Received: partners=\[1, -1\]",
    "partners_none": r"\"uniform\", or a list of workers.*Received: partners=\[\]",
    "partners_text": r"\"uniform\", or a list of workers.*Received: partners='ring'",
    "partners_number": r"\"uniform\", or a list of workers.*Received: partners=1",
    "partner_timeout": r"`partner_timeout_seconds` must be above 0.*=0\.",
    "staleness_negative": r"`max_staleness`.*from 0, or None.*Received: max_staleness=-1",
    "staleness_half": r"`max_staleness`.*Received: max_staleness=1\.5",
    "jit_compile": r"jit_compile=True.*jit_compile=False",
    "jit_compile_in_loop": r"tf\.function\(jit_compile=True\)\. Leave jit_compile out",
}
SAME = r"Expected every worker to be given the same `strategy`: "
OTHERS = {
    "elastic": {
        "other_rate": r"the same `centre`.*0\.2.*Received.*0\.3.*from worker 1",
        "other_period": SAME
        + r"'ElasticAveragingStrategy\(period=2\)', as worker 0 said.*\(period=3\)",
        "async": SAME + r"'ElasticAveragingStrategy.*Received: strategy='AsyncStrategy\(\)'",
        "gossip": SAME + r"'ElasticAveragingStrategy.*Received: strategy=\"GossipStrategy",
        "sync_replicas": SAME + r"'ElasticAveragingStrategy.*Received: strategy='SyncReplicas",
    },
    "gossip": {
        "push": SAME + r"\"GossipStrategy\(mode='pull', period=1\)\".*mode='push'",
        "other_period": SAME + r"\"GossipStrategy\(mode='pull', period=1\)\".*period=2",
        "averaging": SAME + r"\"GossipStrategy.*Received: strategy='ModelAveragingStrategy\(",
        "other_token": r"token",
    },
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with Jobs("mixing_mistakes.py", tmp_path_factory, JOBS) as started:
        yield started


@pytest.mark.parametrize("kind", JOBS)
def test_arguments_that_cannot_be(jobs: Jobs, kind: str) -> None:
    found = jobs[kind].results[1]
    for name, pattern in ARGUMENTS.items():
        assert found[name]["kind"] == "ValueError", found[name]
        assert re.search(pattern, found[name]["message"]), found[name]
        assert found[name]["seconds"] < 25


@pytest.mark.parametrize("kind", JOBS)
def test_a_worker_that_is_given_something_else_is_refused(jobs: Jobs, kind: str) -> None:
    job = jobs[kind]
    for name, pattern in OTHERS[kind].items():
        found = job.results[1][name]
        assert found["kind"] in ("ServiceError", "CredentialsError"), found
        assert re.search(pattern, found["message"]), found
        assert found["seconds"] < 50
    # Worker 0 has noticed nothing, and both have trained together.
    assert job.results[1]["mixed"]["own"] > 0
    assert "refused" not in job.logs["worker 0"]


@pytest.mark.parametrize("kind", JOBS)
def test_a_program_that_goes_to_and_fro_between_models_is_refused(jobs: Jobs, kind: str) -> None:
    found = jobs[kind].results[1]["to_and_fro"]
    # TensorFlow wraps what is raised in a loop of the program's own.
    assert found["kind"] == "InvalidArgumentError", found
    assert re.search(r"to and fro.*kernel.*Update all variables in one", found["message"]), found


def test_a_stranger_is_shown_no_model(jobs: Jobs) -> None:
    found = jobs["gossip"].results[1]["stranger"]
    wrong, right = found["wrong"], found["right"]
    assert not wrong["greeted"] and not wrong["pulled"]
    assert len(wrong["notices"]) == 1 and "token" in wrong["notices"][0]
    assert right["greeted"]
