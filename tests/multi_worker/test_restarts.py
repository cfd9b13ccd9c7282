"""A job that the launcher starts again goes on where it was."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tf_syncdist

pytestmark = pytest.mark.timeout(280)

SCRIPT = """
    import os, signal, sys
    import keras, numpy as np
    import tf_syncdist

    strategy = tf_syncdist.SyncReplicasStrategy(connect_timeout_seconds=100.0)
    keras.utils.set_random_seed(strategy.worker_index)
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("adam", "mse")
    epochs = []

    def note(epoch, logs):
        epochs.append(epoch)
        if (epoch, strategy.is_chief, os.environ["TF_SYNCDIST_RESTARTS"]) == (3, True, "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    x = np.random.RandomState(0).randn(32, 3).astype("float32")
    model.fit(
        x, x[:, :1], batch_size=4, epochs=5, verbose=0,
        callbacks=[
            tf_syncdist.callbacks.BackupAndRestore("backups"),
            keras.callbacks.LambdaCallback(on_epoch_begin=note),
        ],
    )
    iterations = int(model.optimizer.iterations.numpy())
    sha256 = tf_syncdist.variables_sha256(model.trainable_variables)
    print(f"RESULT {epochs} {iterations} {sha256}")
"""


def test_all_go_on_when_the_worker_with_the_service_was_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    job = subprocess.run(
        [
            *(sys.executable, "-m", "tf_syncdist.launch", "--num_workers=2", "--max_restarts=2"),
            "script.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(tf_syncdist.__file__).parents[1])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert job.returncode == 0, job.stdout
    assert "worker 0 was killed by SIGKILL; starting it again in 0.5 s (1 of 2)" in job.stdout
    found = re.findall(r"\[worker (\d)\] RESULT (.*)", job.stdout)
    assert sorted(worker for worker, _ in found) == ["0", "1"], job.stdout
    ends = {worker: end.rpartition("]") for worker, end in found}
    # Worker 1 has gone on, as far as it could until the service had ended with worker 0, and worker
    # 0 comes back to its epoch, with its state.
    assert ends["0"][0] in ("[3, 4", "[4") and ends["1"][0] == "[0, 1, 2, 3, 4"
    assert ends["0"][2] == ends["1"][2] and ends["0"][2].startswith(" 40 ")
    assert not (tmp_path / "backups").exists()
