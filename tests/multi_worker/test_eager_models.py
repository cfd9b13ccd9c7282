"""Several models in one program, trained eagerly by the same function."""

from pathlib import Path

import pytest

from .harness import run_job

pytestmark = pytest.mark.timeout(260)


def test_every_model_starts_from_worker_0_and_ends_alike(tmp_path: Path) -> None:
    job = run_job("eager_models.py", tmp_path, workers=2)
    folds = [job.common(f"fold {fold}") for fold in range(3)]
    assert len({fold["weights_sha256"] for fold in folds}) == 3
    for local in job.each("local"):
        assert local["contributed"] == local["rounds"] == 15
