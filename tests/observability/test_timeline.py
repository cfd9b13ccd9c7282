"""Timelines: what is recorded by several threads becomes one file that a viewer can read."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tf_syncdist.observability.timeline import Timeline, task_path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _complete(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e["ph"] == "X"]


def _rows(trace: dict[str, Any]) -> dict[int, str]:
    """Returns the rows' names by their number."""
    return {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}


def test_an_event_has_its_time_its_row_and_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    now = time.monotonic()
    with Timeline(path, "worker 0") as timeline:
        timeline.record("fc1", "push", now, now + 0.25, "to ps 0", {"slice": 3, "bytes": 200_000})
        timeline.record("fc1", "apply", now + 0.5, now + 0.75)
    trace = _read(path)
    push, apply = _complete(trace)
    assert (push["name"], push["cat"], push["dur"]) == ("fc1", "push", 250_000)
    assert push["args"] == {"slice": 3, "bytes": 200_000}
    assert apply["ts"] - push["ts"] == pytest.approx(500_000, abs=1)
    assert push["ts"] == pytest.approx(time.time() * 1e6, abs=60e6)
    assert [_rows(trace)[e["tid"]] for e in (push, apply)] == ["to ps 0", "apply"]
    named = [e for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert [e["args"]["name"] for e in named] == ["worker 0"]
    assert trace["otherData"] == {"events": 2, "dropped": 0}


def test_overlapping_events_of_a_track_stand_in_rows_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(path, "worker 0") as timeline:
        for name, start, end in (("d", 3, 4), ("a", 0, 2), ("b", 1, 3), ("c", 2, 4)):
            timeline.record(name, "push", start, end)
    trace = _read(path)
    rows = {e["name"]: _rows(trace)[e["tid"]] for e in _complete(trace)}
    assert rows == {"a": "push", "b": "push (2)", "c": "push", "d": "push (2)"}
    order = [
        _rows(trace)[e["tid"]] for e in trace["traceEvents"] if e["name"] == "thread_sort_index"
    ]
    assert order == ["push", "push (2)"]


def test_no_more_than_so_many_events_are_kept_and_the_rest_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(path, "worker 0", max_events=3) as timeline:
        for number in range(10):
            timeline.record(str(number), "sum", number, number + 1)
    assert timeline.dropped == 7
    trace = _read(path)
    assert [e["name"] for e in _complete(trace)] == ["0", "1", "2"]
    assert trace["otherData"] == {"events": 3, "dropped": 7}
    assert "7 later events were dropped" in path.read_text()


def test_threads_may_record_at_the_same_time_also_while_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(path, "worker 0", max_events=3000)
    is_over = threading.Event()

    def record(number: int) -> None:
        for count in range(1000):
            timeline.record(f"{number}", "push", count, count + 0.5, f"thread {number}")
        while not is_over.is_set():
            timeline.record("late", "push", 0.0, 1.0)

    threads = [threading.Thread(target=record, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not timeline.dropped and time.monotonic() < deadline:
        time.sleep(0.001)
    timeline.close()
    is_over.set()
    for thread in threads:
        thread.join(30)
    assert len(_complete(_read(path))) == 3000


def test_it_may_be_closed_twice_and_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(path, "worker 0")
    timeline.close()
    assert _complete(_read(path)) == []
    path.unlink()
    timeline.record("late", "pull", 0.0, 1.0)
    timeline.close()
    assert not path.exists()
    assert timeline.dropped == 0


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.mkdir()
    timeline = Timeline(path, "worker 0")
    with pytest.raises(OSError):
        timeline.close()
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    timeline.close()


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    timeline = Timeline(path, "worker 0")
    timeline.record("a", "compute", 0.0, 1.0)
    assert path.read_text() == "old"
    timeline.close()
    assert len(_complete(_read(path))) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_directory_that_does_not_exist_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Create it first"):
        Timeline(tmp_path / "none" / "trace.json", "worker 0")


def test_numbers_of_numpy_and_other_objects_may_be_arguments(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(path, "worker 0") as timeline:
        timeline.record("a", "pull", 0.0, 1.0, args={"bytes": np.int64(5), "path": tmp_path})
    (event,) = _complete(_read(path))
    assert event["args"] == {"bytes": 5, "path": str(tmp_path)}


def test_tasks_that_were_given_the_same_name_write_files_of_their_own() -> None:
    assert task_path("a/trace.json", "worker", 0, 1) == Path("a/trace.json")
    assert task_path("a/trace.json", "worker", 0, 3) == Path("a/trace.worker-0.json")
    assert task_path("a/trace.json", "worker", 1, 3) == Path("a/trace.worker-1.json")
    assert task_path("trace", "ps", 0, 3) == Path("trace.ps-0")
