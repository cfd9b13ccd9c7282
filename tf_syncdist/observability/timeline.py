"""A timeline of one process: what it did when, as a file that Perfetto and Chrome show."""

import heapq
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TextIO

Category = Literal["compute", "push", "sum", "pull", "apply"]

MAX_EVENTS = 200_000


class Event(NamedTuple):
    """Something that took time.

    Args:
        name: What the viewer writes on it.
        category: What kind of work it is.
        start: When it began, in seconds of `time.monotonic`.
        end: When it ended.
        track: The row of the viewer in which it stands.
        args: What the viewer shows when it is selected.
    """

    name: str
    category: Category
    start: float
    end: float
    track: str
    args: Mapping[str, Any] | None


class Timeline:
    """Records what one process did when, and writes it as Chrome trace events when it is closed.

    Threads may share it. The file opens in https://ui.perfetto.dev and chrome://tracing. Events of
    one track that overlap are put below each other. Times in the file are those of the system's
    clock, so that the events of several files can be joined into one.

    An option that is off is `None` in place of a timeline: whoever records asks for that first.

    Args:
        path: The file. It is written as a whole when the timeline is closed, so a process that is
            killed leaves none.
        process_name: What the viewer calls the process.
        max_events: How many events are kept, which take about 100 MB by default; later ones are
            only counted. Default: 200,000.

    Attributes:
        path: The file.
        dropped: How many events were not kept.

    Raises:
        FileNotFoundError: If the file's directory does not exist.

    Example:

    >>> with Timeline("/tmp/trace.json", "worker 0") as timeline:
    ...     timeline.record("dense", "push", 1.25, 1.5, args={"slice": 3, "bytes": 200_000})
    """

    def __init__(
        self, path: str | os.PathLike, process_name: str, max_events: int = MAX_EVENTS
    ) -> None:
        self.path = pathlib.Path(path)
        self.dropped = 0
        if not self.path.parent.is_dir():
            # Now rather than after hours of training.
            raise FileNotFoundError(
                f"Expected a file in a directory that exists. Received: timeline={str(path)!r}, "
                f"but there is no directory {str(self.path.parent)!r}. Create it first."
            )
        self._process_name = process_name
        self._max_events = max_events
        self._events: list[Event] = []
        self._is_closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(
        self,
        name: str,
        category: Category,
        start: float,
        end: float,
        track: str = "",
        args: Mapping[str, Any] | None = None,
    ) -> None:
        """Records something that is over; does nothing once the timeline is closed.

        Args:
            name: What it is, for instance the name of a layer.
            category: "compute", "push", "sum", "pull" or "apply".
            start: When it began, in seconds of `time.monotonic`.
            end: When it ended.
            track: The row in which it stands. Default: one for each category.
            args: More of it, for instance slice, priority, run and bytes. It is kept, not copied.
        """
        event = Event(name, category, start, end, track or category, args)
        with self._lock:
            if self._is_closed:
                return
            if len(self._events) < self._max_events:
                self._events.append(event)
            else:
                self.dropped += 1

    def close(self) -> None:
        """Writes the file and forgets the events. May be called twice.

        Raises:
            OSError: If the file cannot be written; then there is none.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            events, self._events = self._events, []
        # Several threads or processes that were given the same path must not share it.
        temporary = self.path.with_name(
            f".{self.path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
        )
        try:
            with temporary.open("w", encoding="utf-8") as file:
                self._write(file, events)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self, file: TextIO, events: list[Event]) -> None:
        """Writes event after event: as one text they would take several times their memory."""
        other = json.dumps({"events": len(events), "dropped": self.dropped})
        file.write(f'{{"displayTimeUnit": "ms", "otherData": {other},\n"traceEvents": [')
        encode = json.JSONEncoder(default=_plain).encode
        separator = "\n"
        for line in _trace_events(events, self._process_name, self.dropped):
            file.write(separator)
            file.write(encode(line))
            separator = ",\n"
        file.write("\n]}\n")


def task_path(path: str | os.PathLike, task: str, index: int, num_tasks: int) -> pathlib.Path:
    """Returns where a task of a job writes its timeline, when all tasks were given one name.

    Args:
        path: The name that all of them were given, such as "trace.json".
        task: "worker" or "ps".
        index: Index of the task.
        num_tasks: How many tasks the job has. A single one writes to `path` itself.

    Returns:
        For instance "trace.worker-1.json".
    """
    path = pathlib.Path(path)
    if num_tasks == 1:
        return path
    return path.with_name(f"{path.stem}.{task}-{index}{path.suffix}")


def _trace_events(
    events: list[Event], process_name: str, dropped: int
) -> Iterator[Mapping[str, Any]]:
    """Yields what stands in the file.

    References:
        "Trace Event Format", Chromium project: complete events (X) and metadata (M), times in
        microseconds.
    """
    process = os.getpid()
    if dropped:
        process_name += f" ({dropped} later events were dropped)"
    yield _metadata(process, 0, "process_name", {"name": process_name})
    system_clock_ahead = time.time() - time.monotonic()
    threads: dict[tuple[str, int], int] = {}
    for event, lane in _in_lanes(events):
        key = (event.track, lane)
        thread = threads.get(key)
        if thread is None:
            thread = threads[key] = len(threads) + 1
            name = f"{event.track} ({lane + 1})" if lane else event.track
            yield _metadata(process, thread, "thread_name", {"name": name})
        yield {
            "ph": "X",
            "name": event.name,
            "cat": event.category,
            "ts": _microseconds(event.start + system_clock_ahead),
            "dur": _microseconds(max(0.0, event.end - event.start)),
            "pid": process,
            "tid": thread,
            "args": event.args or {},
        }
    # Viewers sort rows by number otherwise, and the second lane of a track may be a late one.
    for place, key in enumerate(sorted(threads)):
        yield _metadata(process, threads[key], "thread_sort_index", {"sort_index": place})


def _in_lanes(events: Iterable[Event]) -> Iterator[tuple[Event, int]]:
    """Yields events by their start, each with the first lane of its track that is free.

    Viewers expect those of one row to be nested; others they show wrongly, or not at all.
    """
    busy: dict[str, list[tuple[float, int]]] = {}
    free: dict[str, list[int]] = {}
    for event in sorted(events, key=lambda e: (e.start, e.end)):
        running, idle = busy.setdefault(event.track, []), free.setdefault(event.track, [])
        while running and running[0][0] <= event.start:
            heapq.heappush(idle, heapq.heappop(running)[1])
        lane = heapq.heappop(idle) if idle else len(running)
        heapq.heappush(running, (event.end, lane))
        yield event, lane


def _metadata(process: int, thread: int, name: str, args: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": args}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _plain(value: Any) -> Any:
    """Returns what JSON can hold in place of, for instance, a number of numpy's."""
    return value.item() if hasattr(value, "item") else str(value)
