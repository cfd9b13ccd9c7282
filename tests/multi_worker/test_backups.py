"""A job that is killed as a whole goes on from its last backup when it is started again."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .harness import JobResult, run_job

pytestmark = pytest.mark.timeout(560)

WORKERS, STEPS, EPOCHS = 3, 6, 4
KILLED = {f"worker {w}": -signal.SIGKILL for w in range(WORKERS)}


def run(directory: Path, statuses: dict[str, int] | None = None, **arguments: Any) -> JobResult:
    given = {"shared": False, "save_freq": "epoch", "keep": 1, "kill_at": None}
    given |= {"backup_workers": 0} | arguments
    return run_job(
        "backups.py", directory, workers=WORKERS, arguments=given, statuses=statuses, seconds=250
    )


def test_a_killed_job_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")
    directory = tmp_path / "killed"
    directory.mkdir()
    run(directory, KILLED, kill_at=[2, 3])
    # Only worker 0 has written anything.
    assert [p.name for p in directory.glob("own-*/*")] == ["backup-00000001.npz"]
    assert not (directory / "own-1").exists()

    resumed = run(directory)
    assert resumed.common("epochs") == [2, 3]
    assert resumed.common("rounds") == 2 * STEPS
    assert "goes on with epoch 3 from" in resumed.logs["worker 0"]
    for job in (whole, resumed):
        assert job.common("iterations") == EPOCHS * STEPS
        assert not job.common("left"), "backups are deleted at the end"
        # A later fit begins where it is told to.
        assert job.common("again", "epochs") == [0]
        assert job.common("again", "losses") == 1
        job.common("again", "weights_sha256")
    for name in ("weights_sha256", "optimizer_sha256"):
        assert resumed.common(name) == whole.common(name)
    assert resumed.common("loss") == whole.common("loss")[2:]


def test_workers_can_share_a_directory_and_save_within_an_epoch(tmp_path: Path) -> None:
    given = {"shared": True, "save_freq": 4, "keep": 2, "backup_workers": 1}
    run(tmp_path, KILLED, kill_at=[2, 2], **given)
    # After steps 4, 8 and 12, the last of which was that of an epoch.
    names = sorted(p.name for p in tmp_path.glob("shared/*"))
    assert len(names) == 2 and all(n.startswith("backup-") for n in names)

    resumed = run(tmp_path, **given)
    resumed.common("weights_sha256")
    assert resumed.common("epochs") == [2, 3]
    assert resumed.common("iterations") == EPOCHS * STEPS
    assert not (tmp_path / "shared").exists()


def test_all_workers_refuse_what_worker_0_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "own-0").mkdir()
    file = tmp_path / "own-0" / "backup-00000007.npz"
    np.savez(file, weights=np.zeros(3))
    job = run(tmp_path, {f"worker {w}": 1 for w in range(WORKERS)})
    assert not job.results
    last = [job.logs[f"worker {w}"].splitlines()[-1] for w in range(WORKERS)]
    assert str(file) in last[0] and "Delete it" in last[0]
    assert all("BackupError" in line for line in last[:1])
    # Without a `ps` task, worker 0 may take the service with it before its error has arrived.
    assert all("worker 0" in line for line in last[1:])
