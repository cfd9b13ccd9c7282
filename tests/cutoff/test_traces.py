"""Traces of run-times: what goes into a file comes out of it; what makes no sense is refused."""

import io
from pathlib import Path

import numpy as np
import pytest

from tf_syncdist.cutoff import traces
from tf_syncdist.cutoff.traces import Recorder, Trace
from tf_syncdist.errors import TraceError

from .regimes import regimes, round_times

SECONDS = regimes(20, 5, 2, 2.5, seed=0)


def trace(**arrays: object) -> Trace:
    return traces.of_seconds(SECONDS)._replace(**{k: np.array(v) for k, v in arrays.items()})


def with_value(value: float, *place: int) -> np.ndarray:
    seconds = SECONDS.copy()
    seconds[place] = value
    return seconds


def test_a_file_gives_back_what_was_recorded_late_and_absent_workers_too(tmp_path: Path) -> None:
    recorder = Recorder(5)
    for run, row in enumerate(SECONDS):
        recorder.observe(round_times(row, 4, run))
    recorded = recorder.trace()
    assert np.isnan(recorded.seconds).sum() == 20
    recorded.present[3, np.isnan(recorded.seconds[3])] = False
    traces.save(tmp_path / "trace", recorded)
    loaded = traces.load(tmp_path / "trace", num_workers=5)
    for name in Trace._fields:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(recorded, name))
    assert [p.name for p in tmp_path.iterdir()] == ["trace"]
    again = Recorder(5)
    for times in loaded.rounds():
        again.observe(times)
    np.testing.assert_array_equal(again.trace().seconds, recorded.seconds)


def test_a_recorder_keeps_the_newest_rounds_and_none_without_a_time() -> None:
    recorder = Recorder(5, max_rounds=3)
    for row in SECONDS:
        recorder.observe(round_times(row))
    recorder.observe(round_times(SECONDS[0])._replace(seconds=np.full(5, np.nan)))
    np.testing.assert_array_equal(recorder.trace().seconds, SECONDS[-3:])
    np.testing.assert_array_equal(recorder.last(1)[0].seconds, SECONDS[-1])
    recorder.clear()
    assert len(recorder) == 0
    with pytest.raises(TraceError, match="a round at least"):
        recorder.trace()


@pytest.mark.parametrize(
    "wrong, parts",
    [
        ({"seconds": with_value(-1.0, 7, 2)}, ("-1.0", "round 7, worker 2")),
        ({"seconds": with_value(np.inf, 7, 2)}, ("inf", "round 7, worker 2")),
        ({"seconds": with_value(np.nan, 7)}, ("round 7", "not only NaN")),
        ({"closed_seconds": [1.0] * 19 + [np.nan]}, ("nan", "round 19")),
        ({"closed_seconds": [1.0] * 19 + [-2.0]}, ("-2.0", "round 19")),
        ({"closed_seconds": [1.0] * 19}, ("20 rounds", "[19]")),
        ({"present": np.ones((20, 4), bool)}, ("[20, 5]", "[20, 4]")),
        ({"present": np.ones((20, 5))}, ("bool", "float64")),
        ({"seconds": SECONDS.astype(np.float32)}, ("float64", "float32")),
        ({"seconds": SECONDS[0]}, ("[rounds, workers]", "[5]")),
        ({"seconds": SECONDS[:0]}, ("a round at least", "[0, 5]")),
    ],
)
def test_times_that_make_no_sense_are_refused_before_and_after_they_are_in_a_file(
    wrong: dict, parts: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match="Received: ") as error:
        traces.save(tmp_path / "trace", trace(**wrong))
    assert all(part in str(error.value) for part in parts)
    assert not list(tmp_path.iterdir())
    np.savez(tmp_path / "t.npz", kind="trace of run-times", version=1, **trace(**wrong)._asdict())
    with pytest.raises(TraceError, match="t.npz") as error:
        traces.load(tmp_path / "t.npz")
    assert all(part in str(error.value) for part in parts)


def test_a_trace_of_other_workers_is_refused(tmp_path: Path) -> None:
    traces.save(tmp_path / "trace", trace())
    with pytest.raises(TraceError, match=r"Expected a trace of 4 workers.*Received: a trace of 5"):
        traces.load(tmp_path / "trace", num_workers=4)


def _content(**changes: object) -> bytes:
    arrays = {"kind": "trace of run-times", "version": 1, **trace()._asdict(), **changes}
    file = io.BytesIO()
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
    return file.getvalue()


@pytest.mark.parametrize(
    "content, part",
    [
        (_content()[:-100], "cut off or damaged"),
        (_content()[:500], "cut off or damaged"),
        (b"", "cut off or damaged"),
        (b"run,worker,seconds\n0,0,1.5\n", "cut off or damaged"),
        (_content(seconds=np.array([None, {}])), "cannot be read"),
        (_content(version=2), "format 1. Received"),
        (_content(version=None), "another version"),
        (_content(kind="model of run-times"), "'model of run-times'"),
        (_content(kind=None), "'something else'"),
        (_content(seconds=None), "without seconds"),
        (_content(seconds=None, present=None), "without seconds, present"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match="Received: ") as error:
        traces.load(path)
    assert part in str(error.value) and str(path) in str(error.value)


def test_a_single_array_is_no_trace(tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", SECONDS)
    with pytest.raises(TraceError, match="cannot be read"):
        traces.load(tmp_path / "trace.npy")


def test_a_file_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="which is not there"):
        traces.load(tmp_path / "trace.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace"
    traces.save(path, trace())

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        traces.save(path, trace().part(0, 2))
    assert traces.load(path).num_rounds == 20
    assert [p.name for p in tmp_path.iterdir()] == ["trace"]
