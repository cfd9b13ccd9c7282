"""Training of run-time models: in the process, and as a command."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tf_syncdist.cutoff import models, replay, traces
from tf_syncdist.cutoff.learned import experts
from tf_syncdist.cutoff.models import RunTimeModel
from tf_syncdist.cutoff.network import Network
from tf_syncdist.cutoff.smoothing import Smoother
from tf_syncdist.cutoff_training import display, training
from tf_syncdist.cutoff_training.batches import Batches
from tf_syncdist.errors import TraceError

from ..cutoff.regimes import regimes, round_times

N = 12
SECONDS = regimes(900, N, 4, 2.5, seed=1)
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.fixture(scope="module")
def trained() -> tuple[RunTimeModel, list[training.Progress]]:
    history: list[training.Progress] = []
    trace = traces.of_seconds(SECONDS)
    return training.train(trace, steps=500, on_progress=history.append), history


def test_the_bound_rises_on_what_is_held_out(trained: tuple) -> None:
    _, history = trained
    assert [p.step for p in history] == list(range(100, 501, 100))
    bounds = [p.bound for p in history]
    assert max(bounds) > bounds[0] + 0.5
    assert [p.best for p in history] == [
        b > max(bounds[:i], default=-9e9) for i, b in enumerate(bounds)
    ]


def test_numpy_predicts_what_tensorflow_has_learned(trained: tuple) -> None:
    model, _ = trained
    seconds = regimes(400, N, 4, 2.5, seed=2)
    network, smoother = Network(model.weights), Smoother(N)
    scores = []
    for run, row in enumerate(seconds):
        times = round_times(row, None, run)
        if run > 20:
            scores.append([network.log_score(times), smoother.log_score(times)])
        network.observe(times)
        smoother.observe(times)
    learned, plain = np.mean(scores, axis=0)
    assert learned > plain - 0.25
    played = replay.replay(Network(model.weights), seconds, 3, 20)
    assert played.throughput > 0.85 * replay.oracle_throughput(seconds, 3)
    assert played.throughput > replay.static_throughputs(seconds).max()


def test_the_evaluation_is_of_the_rounds_that_were_held_out(trained: tuple) -> None:
    evaluation = trained[0].evaluation
    held_out = SECONDS[765:]
    static = replay.static_throughputs(held_out)
    assert evaluation.full_sync == pytest.approx(static[-1])
    assert evaluation.best_static == pytest.approx(static.max())
    assert evaluation.best_count == static.argmax() + 1
    assert evaluation.best_static < evaluation.learned < evaluation.oracle
    played = replay.replay(experts(trained[0]), SECONDS[715:], 3, 50)
    assert evaluation.learned == pytest.approx(
        replay.Replay(played.counts[50:], played.seconds[50:]).throughput
    )


def test_equal_seeds_give_equal_models() -> None:
    trace = traces.of_seconds(SECONDS[:150])
    one, two = (training.train(trace, seed=3, steps=10).weights for _ in range(2))
    np.testing.assert_array_equal(one.mean_hidden, two.mean_hidden)


def test_groups_come_from_rounds_of_their_own_and_workers_of_one_group_from_the_same() -> None:
    times = np.arange(50, dtype=np.float32)[:, None] + np.zeros((1, 4), np.float32)
    batches = Batches(times, np.array([0, 0, 1, 1]), window=5, size=16, seed=0)
    mixed = 0
    for _ in range(40):
        batch = batches.draw()
        assert batch.shape == (16, 5, 4) and batch.dtype == np.float32
        assert (np.diff(batch, axis=1) == 1).all()
        assert (batch[..., 0] == batch[..., 1]).all() and (batch[..., 2] == batch[..., 3]).all()
        assert sorted(batch[:, 0, 0]) == sorted(batch[:, 0, 2])
        mixed += (batch[..., 0] != batch[..., 2]).any()
    assert 20 < mixed < 40


def test_a_trace_that_is_too_short_is_refused() -> None:
    with pytest.raises(TraceError, match=r"100 rounds at least.*Received: 99 round"):
        training.train(traces.of_seconds(SECONDS[:99]))


def _command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tf_syncdist.train_cutoff", *flags],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )


def test_the_command_learns_from_rounds_that_were_cut_and_says_what_it_is_good_for(
    tmp_path: Path,
) -> None:
    recorder = traces.Recorder(N)
    for run, row in enumerate(SECONDS[:300]):
        recorder.observe(round_times(row, None if run % 3 else 9, run))
    traces.save(tmp_path / "trace.npz", recorder.trace())
    output = tmp_path / "model.npz"
    done = _command(f"--trace={tmp_path / 'trace.npz'}", f"--output={output}", "--steps=200")
    assert done.returncode == 0, done.stderr
    for part in ("300 rounds of 12 workers", "step 200 of 200", "held-out ELBO", "is kept"):
        assert part in done.stdout
    for part in ("full sync", "best fixed cutoff", "learned cutoff", "oracle"):
        assert part in done.stdout
    assert models.load(output).num_workers == N


def test_the_command_tells_what_is_wrong_at_once(tmp_path: Path) -> None:
    (tmp_path / "trace.npz").write_bytes(b"no trace")
    done = _command(f"--trace={tmp_path / 'trace.npz'}", f"--output={tmp_path / 'm.npz'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Expected the file of a trace of run-times" in done.stderr
    done = _command("--trace=x", f"--output={tmp_path / 'none' / 'm.npz'}")
    assert done.returncode == 1 and "a directory that exists" in done.stderr


class _Terminal:
    """A stream that says that it is a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        self.text = ""
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_terminal_gets_a_bar_that_moves_and_a_log_gets_lines() -> None:
    for is_terminal in (True, False):
        stream = _Terminal(is_terminal)
        shown = display.Display(stream)
        for step in range(1, 101):
            shown(training.Progress(step, 100, step / 100, True))
        assert stream.text.count("\n") == (1 if is_terminal else 10)
        assert stream.text.count("\r") == (100 if is_terminal else 0)
        assert "step 100 of 100" in stream.text
    assert "step   100     1.0000" in display.curve(shown.history)
    assert display.curve(shown.history[:1]).count("\n") == 2
