"""Measures what the loss of a process costs: of a worker, and of an aggregator.

    python -m benchmarks.recovery --state_megabytes=100 --json_out=recovery.json

Every process is one on this machine; the step of a worker sleeps for a fixed time, so the cores of
the machine do not decide the result. Workers train until both faults have been seen to:

* the last worker is killed, and started again after `--down_seconds`;
* the aggregator is killed, and started again at once.

"stall" is how much longer than usual the others' longest round took in the seconds after the fault,
and "next round" how long after it a round was closed. "rejoin" is the time from the restarted
worker's hello, which is sent when TensorFlow has been imported, until a round has its values; of
this, "rejoin state" is the time until it computes, when it has been given the state. Rates are
those of worker 0.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

from benchmarks import processes

_NUM_WORKERS = flags.DEFINE_integer("num_workers", 3, "Workers.", lower_bound=2)
_BACKUP_WORKERS = flags.DEFINE_integer("backup_workers", 0, "Backup workers.", lower_bound=0)
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.05, "Sleep of a step.", lower_bound=0)
_STATE_MEGABYTES = flags.DEFINE_float("state_megabytes", 100.0, "Size of the state.")
_MEASURE_SECONDS = flags.DEFINE_float(
    "measure_seconds", 5.0, "How long rates are measured.", lower_bound=1
)
_DOWN_SECONDS = flags.DEFINE_float(
    "down_seconds", 8.0, "Time from the end of a worker to its restart.", lower_bound=1
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 1, "How often all of it is measured; rows are medians.", lower_bound=1
)
_TIMEOUT_SECONDS = flags.DEFINE_float("timeout_seconds", 120, "Deadline of one repeat.")
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows, if given.")

_WARMUP_ROUNDS = 20
# A round that begins later than this after a fault is not one that the fault has held up.
_BEGUN_SECONDS = 5.0
_COLUMNS = {
    "fault": "fault",
    "rate_before": "before /s",
    "rate_without": "without /s",
    "rate_while_rejoining": "rejoining /s",
    "rate_after": "after /s",
    "stall_seconds": "stall s",
    "next_round_seconds": "next round s",
    "rejoin_state_seconds": "rejoin state s",
    "rejoin_seconds": "rejoin s",
    "listening_seconds": "listening s",
}

Row = dict[str, Any]


class _Job:
    """The processes of one job, each of which can be killed and started again.

    Args:
        directory: Where logs, events and results are written.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        addresses = processes.free_addresses(_NUM_WORKERS.value + 1)
        self._cluster = {"worker": addresses[:-1], "ps": addresses[-1:]}
        self._deadline = time.time() + _TIMEOUT_SECONDS.value
        self._tasks: dict[str, processes.Task] = {}
        self._everybody: list[processes.Task] = []
        self._lives: dict[str, int] = {}
        self._stop_file = directory / "stop"

    def start(self, name: str) -> None:
        """Starts "ps 0" or "worker I", perhaps again."""
        kind, index = name.split()
        life = self._lives[name] = self._lives.get(name, -1) + 1
        directory = self._directory / f"life_{life}"
        directory.mkdir(exist_ok=True)
        if kind == "ps":
            port = self._cluster["ps"][0].rpartition(":")[2]
            module, arguments = "tf_syncdist.aggregator", [f"--port={port}"]
        else:
            module = "benchmarks.recovery_worker"
            arguments = [
                f"--backup_workers={_BACKUP_WORKERS.value}",
                f"--step_seconds={_STEP_SECONDS.value}",
                f"--state_megabytes={_STATE_MEGABYTES.value}",
                f"--events_file={self._events_file(name, life)}",
                f"--stop_file={self._stop_file}",
                f"--give_up_at={self._deadline}",
                f"--result_file={directory / f'worker_{index}.json'}",
            ]
        task = processes.start(module, kind, int(index), self._cluster, arguments, directory)
        self._tasks[name] = task
        self._everybody.append(task)

    def kill(self, name: str) -> float:
        """Kills a task and returns when."""
        at = time.time()
        self._tasks.pop(name).kill()
        return at

    def events(self, name: str) -> list[dict[str, Any]]:
        """Returns what a worker has noted in its present life."""
        path = self._events_file(name, self._lives[name])
        if not path.exists():
            return []
        *lines, _ = path.read_text().split("\n")
        return [json.loads(line) for line in lines]

    def ends_of_runs(self, name: str = "worker 0") -> list[float]:
        """Returns when a worker's runs of its present life ended."""
        return [e["time"] for e in self.events(name) if e["event"] == "run"]

    def until(self, there: Callable[[], Any], what: str) -> Any:
        """Waits until a function returns something true, and returns that."""
        while not (found := there()):
            failed = [t for t in self._tasks.values() if t.process.poll()]
            if failed or time.time() > self._deadline:
                logs = "\n".join(f"{t}:\n{t.log_tail()}" for t in self._everybody)
                why = f"{failed[0]} failed" if failed else "the deadline passed"
                raise processes.ClusterFailedError(
                    f"Expected {what}, but {why}; raise --timeout_seconds if the machine is slow. "
                    f"Logs:\n{logs}"
                )
            time.sleep(0.01)
        return found

    def listens(self) -> bool:
        """Returns whether the aggregator can be connected to."""
        host, _, port = self._cluster["ps"][0].rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1.0):
            return True
        return False

    def finish(self) -> None:
        """Ends training and checks that all workers hold the same variables."""
        self._stop_file.touch()
        names = [n for n in self._tasks if n.startswith("worker")]
        self.until(lambda: all(self._tasks[n].poll() for n in names), "all workers to end")
        results = [json.loads(self._tasks[n].result_file.read_text()) for n in names]
        if len({r["variables_sha256"] for r in results}) != 1:
            raise processes.ClusterFailedError(
                f"Expected all workers to end with the same variables, got {results}; the times of "
                "such a job mean nothing, so look for the error in the strategy first."
            )

    def close(self) -> None:
        """Ends all processes."""
        for task in self._everybody:
            task.kill()

    def _events_file(self, name: str, life: int) -> pathlib.Path:
        return self._directory / f"{name.replace(' ', '_')}.life_{life}.events"


def _rate(ends: Sequence[float], start: float, stop: float) -> float | None:
    """Returns rounds per second between two times, from whole rounds."""
    inside = [end for end in ends if start <= end <= stop]
    if len(inside) < 2:
        return None
    return (len(inside) - 1) / (inside[-1] - inside[0])


def _stall(ends: Sequence[float], fault_at: float, until: float) -> tuple[float, float, float]:
    """Returns by how much the longest round after a fault exceeds others, and when rounds ended.

    Args:
        ends: When rounds ended.
        fault_at: When the fault happened.
        until: When it was over at the latest.

    Returns:
        Seconds beyond the usual, seconds from the fault to the end of the next round, and the end
        of the longest one.
    """
    usual = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False) if b <= fault_at)
    rounds = [
        (b - a, b)
        for a, b in zip(ends, ends[1:], strict=False)
        if fault_at <= b <= until and a <= fault_at + _BEGUN_SECONDS
    ]
    longest, end = max(rounds)
    return longest - usual, rounds[0][1] - fault_at, end


def _lose_worker(job: _Job) -> Row:
    """Kills the last worker and starts it again."""
    name = f"worker {_NUM_WORKERS.value - 1}"
    window = _MEASURE_SECONDS.value
    time.sleep(window)
    killed_at = job.kill(name)
    time.sleep(_DOWN_SECONDS.value)
    job.start(name)

    def contributes() -> float | None:
        return next((e["time"] for e in job.events(name) if e.get("contributed")), None)

    contributes_at = job.until(contributes, "the restarted worker to contribute")
    noted = {e["event"]: e["time"] for e in reversed(job.events(name))}
    time.sleep(window)
    ends = job.ends_of_runs()
    stall, next_round, went_on_at = _stall(ends, killed_at, noted["hello"])
    return {
        "fault": "worker",
        "rate_before": _rate(ends, killed_at - window, killed_at),
        "rate_without": _rate(ends, went_on_at, noted["hello"]),
        "rate_while_rejoining": _rate(ends, noted["hello"], contributes_at),
        "rate_after": _rate(ends, contributes_at, contributes_at + window),
        "stall_seconds": stall,
        "next_round_seconds": next_round,
        "rejoin_state_seconds": noted["computes"] - noted["hello"],
        "rejoin_seconds": contributes_at - noted["hello"],
    }


def _lose_aggregator(job: _Job) -> Row:
    """Kills the aggregator and starts it again."""
    window = _MEASURE_SECONDS.value
    time.sleep(window)
    killed_at = job.kill("ps 0")
    job.start("ps 0")
    job.until(job.listens, "the aggregator to listen again")
    listening_at = time.time()
    done = len(job.ends_of_runs())
    job.until(lambda: len(job.ends_of_runs()) > done + 2, "rounds after the aggregator's restart")
    time.sleep(window)
    ends = job.ends_of_runs()
    stall, next_round, went_on_at = _stall(ends, killed_at, ends[-1])
    return {
        "fault": "aggregator",
        "rate_before": _rate(ends, killed_at - window, killed_at),
        "rate_after": _rate(ends, went_on_at, went_on_at + window),
        "stall_seconds": stall,
        "next_round_seconds": next_round,
        "listening_seconds": listening_at - killed_at,
    }


@contextlib.contextmanager
def _running() -> Iterator[_Job]:
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        job = _Job(pathlib.Path(name))
        try:
            job.start("ps 0")
            names = [f"worker {index}" for index in range(_NUM_WORKERS.value)]
            for worker in names:
                job.start(worker)
            job.until(
                lambda: all(len(job.ends_of_runs(n)) >= _WARMUP_ROUNDS for n in names),
                f"{_WARMUP_ROUNDS} rounds",
            )
            yield job
            job.finish()
        finally:
            job.close()


def _median(rows: Sequence[Row]) -> Row:
    """Returns the medians of rows that are about the same."""
    row = dict(rows[0])
    for name in row:
        values = [r[name] for r in rows if isinstance(r[name], float)]
        if values:
            row[name] = statistics.median(values)
    return row


def _table(rows: Sequence[Row]) -> str:
    """Returns the rows as aligned text."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(_COLUMNS.values())]
    lines += [[cell(row.get(column)) for column in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    measured: list[list[Row]] = []
    for repeat in range(_REPEATS.value):
        print(f"measuring, {repeat + 1} of {_REPEATS.value} ...", file=sys.stderr, flush=True)
        try:
            with _running() as job:
                measured.append([_lose_worker(job), _lose_aggregator(job)])
        except processes.ClusterFailedError as error:
            sys.exit(f"failed: {error}")
    rows = [_median(same) for same in zip(*measured, strict=True)]
    settings = {
        "workers": _NUM_WORKERS.value,
        "backup_workers": _BACKUP_WORKERS.value,
        "step_seconds": _STEP_SECONDS.value,
        "state_megabytes": _STATE_MEGABYTES.value,
        "repeats": _REPEATS.value,
    }
    print(_table(rows))
    if _JSON_OUT.value:
        text = json.dumps([{**settings, **row} for row in rows], indent=2)
        pathlib.Path(_JSON_OUT.value).write_text(text)


if __name__ == "__main__":
    app.run(main)
