"""A job under mutual TLS with a token: `fit` as ever, and nobody else gets in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import Jobs

pytestmark = pytest.mark.timeout(300)

CERTIFICATES = Path(__file__).parents[1] / "certificates"
ROUNDS = 30
SECRET = "a-secret-of-the-test"
OPTIONS = {
    "tls_cert": str(CERTIFICATES / "task.pem"),
    "tls_key": str(CERTIFICATES / "task.key"),
    "tls_ca": str(CERTIFICATES / "ca.pem"),
    "token": SECRET,
}
VARIABLES = {f"TF_SYNCDIST_{name.upper()}": value for name, value in OPTIONS.items()}
JOBS = {
    "plain": {"arguments": {"options": {}}},
    "environment": {"arguments": {"options": {}}, "environment": VARIABLES, "ps": 1},
    "options": {
        "arguments": {"options": OPTIONS},
        # Options beat the environment, in the `ps` task that becomes the service too.
        "environment": {"TF_SYNCDIST_TOKEN": "another", "TF_SYNCDIST_TLS_CA": "/none"},
        "ps": 1,
        "ps_runs_program": True,
    },
    "child": {"arguments": {"options": OPTIONS}},
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    wanted = {name: {"workers": 2, **job} for name, job in JOBS.items()}
    with Jobs("security.py", tmp_path_factory, wanted) as started:
        yield started


@pytest.mark.parametrize("name", [name for name in JOBS if name != "plain"])
def test_fit_ends_with_the_same_bits_as_without_credentials(jobs: Jobs, name: str) -> None:
    job, plain = jobs[name], jobs["plain"]
    assert job.common("weights_sha256") == plain.common("weights_sha256")
    assert job.common("history") == plain.common("history")
    assert job.common("report", "rounds") == ROUNDS
    for text in (*job.logs.values(), *job.each("report_text")):
        assert SECRET not in text and "refused" not in text
