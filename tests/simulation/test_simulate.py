"""`python -m tf_syncdist.simulate`, comparisons, and traces with gaps."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from tf_syncdist.cutoff import BackupWorkers, FullSync, traces
from tf_syncdist.cutoff.replay import static_throughputs
from tf_syncdist.cutoff.traces import Trace
from tf_syncdist.errors import TraceError
from tf_syncdist.simulation import comparison, console, filling, laws
from tf_syncdist.simulation.jobs import simulate


def trace(rounds: int, workers: int = 5, late: int = 0) -> Trace:
    """A trace whose last `late` workers of every round were late, from the second on."""
    seconds = laws.LogNormal(0.3).sample(rounds, workers, np.random.default_rng(0))
    whole = traces.of_seconds(seconds)
    if not late:
        return whole
    closed = np.sort(seconds, axis=1)[:, -1 - late]
    closed[0] = seconds[0].max()
    return whole._replace(
        seconds=np.where(seconds <= closed[:, None], seconds, np.nan), closed_seconds=closed
    )


def run(capsys: pytest.CaptureFixture, **arguments: object) -> str:
    console.run(console.Arguments(**arguments))
    return capsys.readouterr().out


def test_the_command_of_the_documentation() -> None:
    command = "-m tf_syncdist.simulate --workers=100 --law=chen2016 --cutoff=backup:4 --sweep"
    done = subprocess.run(
        [sys.executable, *command.split(), "--rounds=300"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "chen2016: 100 workers, 300 rounds" in done.stdout
    assert "backup:4" in done.stdout and "oracle" in done.stdout
    assert "late per worker: least" in done.stdout
    assert "best: b = " in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--law=gamma", "Expected a law of chen2016"),
        ("--workers=4 --cutoff=backup:4", "at most 3"),
        ("--trace=/nowhere/trace.npz", "which is not there"),
    ],
)
def test_mistakes_end_with_a_message(flags: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tf_syncdist.simulate", *flags.split()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_what_is_written_is_what_was_simulated(tmp_path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rows.json"
    cutoffs = ["full", "backup:2", "order_statistics"]
    arguments = dict(workers=9, rounds=40, law="pareto:1.5", seed=3, late_workers_stay_busy=True)
    out = run(capsys, cutoffs=cutoffs, json_out=str(file), sweep=True, **arguments)
    data = json.loads(file.read_text())
    assert [row["policy"] for row in data["rows"]] == cutoffs
    seconds = laws.Pareto(1.5).sample(40, 9, np.random.default_rng(3))
    outcome = simulate(seconds, BackupWorkers(2), late_workers_stay_busy=True)
    row = data["rows"][1]
    assert row["throughput"] == pytest.approx(outcome.throughput)
    assert row["dropped"] == outcome.dropped.tolist()
    assert row["skipped"] == outcome.skipped.tolist()
    assert row["oracle_ratio"] == pytest.approx(row["throughput"] / data["oracle_throughput"])
    assert data["sweep"]["throughputs"][2] == pytest.approx(outcome.throughput)
    best = data["sweep"]["best"]
    assert f"best: b = {best}" in out
    assert data["sweep"]["throughputs"][best] == max(data["sweep"]["throughputs"])
    for name in cutoffs:
        assert name in out


def test_the_curve_without_persistence_is_that_of_the_rounds() -> None:
    seconds = laws.Chen2016().sample(50, 12, np.random.default_rng(0))
    swept = comparison.sweep(seconds)
    assert swept.backup_workers == list(range(12))
    for b in (0, 3, 11):
        simulated = simulate(seconds, BackupWorkers(b)).throughput
        assert swept.throughputs[b] == pytest.approx(simulated)


def test_a_curve_of_many_workers_has_few_points() -> None:
    seconds = laws.Normal().sample(3, 500, np.random.default_rng(0))
    swept = comparison.sweep(seconds, late_workers_stay_busy=True, most=12)
    assert len(swept.backup_workers) <= 12
    assert swept.backup_workers[:2] == [0, 1] and swept.backup_workers[-1] == 499
    assert swept.backup_workers == sorted(swept.backup_workers)


def test_a_trace_is_compared_as_it_is(tmp_path, capsys: pytest.CaptureFixture) -> None:
    recorded = trace(150)
    traces.save(tmp_path / "trace", recorded)
    file = tmp_path / "rows.json"
    out = run(capsys, trace=str(tmp_path / "trace"), json_out=str(file))
    # For a model the trace is too short, and that is said.
    assert "learned is left out, as it takes 200 rounds" in out
    assert "not measured" not in out
    rows = json.loads(file.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["full", "backup:1", "backup:2"]
    expected = static_throughputs(recorded.seconds)[::-1]
    assert [row["throughput"] for row in rows] == pytest.approx(expected[:3])


def test_a_trace_of_two_workers_has_one_backup_worker_at_most(
    tmp_path, capsys: pytest.CaptureFixture
) -> None:
    traces.save(tmp_path / "trace", trace(20, workers=2))
    out = run(capsys, trace=str(tmp_path / "trace"))
    assert "backup:1" in out and "backup:2" not in out


def test_what_was_not_measured_is_said_and_filled(tmp_path, capsys: pytest.CaptureFixture) -> None:
    traces.save(tmp_path / "trace", trace(50, late=2))
    out = run(capsys, trace=str(tmp_path / "trace"), cutoffs=["full"])
    assert "98 of 250 times were not measured (98 of late workers, 0 of absent ones)" in out


def test_late_times_are_filled_with_longer_ones() -> None:
    recorded = trace(200, late=2)
    filled = filling.fill(recorded)
    late = np.isnan(recorded.seconds)
    assert (filled.seconds[~late] == recorded.seconds[~late]).all()
    closed = np.broadcast_to(recorded.closed_seconds[:, None], late.shape)
    assert (filled.seconds[late] >= closed[late]).all()
    # Nearly always somebody is known to have needed longer.
    assert (filled.seconds[late] > closed[late]).mean() > 0.95
    assert (filled.late, filled.absent) == (late.sum(), 0)
    assert (filling.fill(recorded).seconds == filled.seconds).all()


def test_absent_workers_are_filled_with_their_own_times() -> None:
    recorded = trace(50)
    present = recorded.present.copy()
    present[10:40, 1] = False
    seconds = np.where(present, recorded.seconds, np.nan)
    filled = filling.fill(Trace(seconds, recorded.closed_seconds, present))
    assert (filled.late, filled.absent) == (0, 30)
    assert set(filled.seconds[10:40, 1]) <= set(seconds[:, 1])
    # One that was never there is like anybody.
    present[:, 1] = False
    seconds = np.where(present, recorded.seconds, np.nan)
    filled = filling.fill(Trace(seconds, recorded.closed_seconds, present))
    assert set(filled.seconds[:, 1]) <= set(seconds[~np.isnan(seconds)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "--workers=0"),
        ({"law": "trace"}, "--law=trace together with --trace"),
        ({"law": "normal", "trace": "x"}, "--law=normal, --trace=x"),
        ({"rounds": 10, "first_round": 10}, "--first_round=10"),
        ({"rounds": 10, "cutoffs": ["learned"]}, "at least 200 rounds"),
        ({"cutoffs": ["learned:/nowhere/model.npz"]}, "which is not there"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        console.run(console.Arguments(**arguments))


def test_traces_that_do_not_fit_are_refused(tmp_path) -> None:
    path = tmp_path / "trace"
    traces.save(path, trace(20))
    with pytest.raises(TraceError, match="trace of 7 workers"):
        console.run(console.Arguments(trace=str(path), workers=7))
    with pytest.raises(ValueError, match="at most 20 rounds"):
        console.run(console.Arguments(trace=str(path), rounds=21))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TraceError, match="cut off or damaged"):
        console.run(console.Arguments(trace=str(path)))


def test_a_figure_needs_matplotlib_and_says_how_to_get_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "figure.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"tf-syncdist\[plot\]"):
        console.run(console.Arguments(plot=str(file)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("sweep", [False, True])
def test_a_figure_is_drawn(tmp_path, sweep: bool, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "figure.png"
    run(capsys, workers=5, rounds=10, cutoffs=["full", "backup:1"], sweep=sweep, plot=str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_first_rounds_only_teach() -> None:
    seconds = np.concatenate((np.full((10, 4), 7.0), np.ones((10, 4))))
    compared = comparison.compare(seconds, {"full": FullSync()}, first_round=10)
    (row,) = compared.rows
    assert row.throughput == compared.oracle_throughput == pytest.approx(4.0)
    assert (row.rounds, row.computed, row.oracle_ratio) == (10, 40, pytest.approx(1.0))


def test_every_flag_has_an_argument() -> None:
    probe = "from tf_syncdist import simulate; from absl import flags; flags.FLAGS(['x']); "
    probe += "print([f.name for f in flags.FLAGS.flags_by_module_dict()[simulate.__name__]])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=60)
    known = {field.name for field in dataclasses.fields(console.Arguments)}
    assert {n.rstrip("s") for n in eval_list(done.stdout.decode())} == {
        n.rstrip("s") for n in known
    }


def eval_list(text: str) -> list[str]:
    return json.loads(text.replace("'", '"'))
