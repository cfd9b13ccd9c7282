"""The processes of benchmarks.propagation: one service, its workers, and their links."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import links, processes

_POLL_SECONDS = 0.02
# Workers print their stacks before they are killed.
_WORKER_TIMEOUT_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Phase:
    """What the workers measured between two changes of the bandwidth.

    Args:
        step_seconds: The steps' times, the means of all workers.
        chain_seconds: From the begin of the first layer's forward pass to the end of its backward
            pass, in the same way; empty for real layers.
        cpu_seconds: Processor time of all processes per step.
    """

    step_seconds: Sequence[float]
    chain_seconds: Sequence[float]
    cpu_seconds: float


class Job:
    """A cluster that trains in phases; ends with the `with` block.

    Args:
        flags: Flags of the workers.
        num_workers: How many workers.
        num_shards: How many processes the service has.
        cables: A link for each worker, or none.
        timeout_seconds: How long all of it may take.
    """

    def __init__(
        self,
        flags: Sequence[str],
        num_workers: int,
        num_shards: int,
        cables: Sequence[links.Link],
        timeout_seconds: float,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._phases = 0
        self._tasks: list[processes.Task] = []
        self._workers: list[processes.Task] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="benchmark_")
        self._directory = pathlib.Path(self._temporary.name)
        try:
            self._start(flags, num_workers, num_shards, cables)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(
        self,
        flags: Sequence[str],
        num_workers: int,
        num_shards: int,
        cables: Sequence[links.Link],
    ) -> None:
        host = cables[0].address if cables else "127.0.0.1"
        addresses = processes.free_addresses(num_workers + num_shards)
        shards = [f"{host}:{a.rpartition(':')[2]}" for a in addresses[num_workers:]]
        cluster = {"worker": addresses[:num_workers], "ps": shards}
        give_up_at = time.time() + self._timeout_seconds * _WORKER_TIMEOUT_SHARE
        for index, address in enumerate(shards):
            arguments = [
                f"--host={host}",
                f"--port={address.rpartition(':')[2]}",
                "--insecure",
                f"--max_seconds={self._timeout_seconds}",
            ]
            module = "tf_syncdist.aggregator"
            self._add(processes.start(module, "ps", index, cluster, arguments, self._directory))
        for index in range(num_workers):
            arguments = [
                *flags,
                f"--directory={self._directory}",
                f"--give_up_at={give_up_at}",
                f"--result_file={self._directory / f'worker_{index}.json'}",
            ]
            prefix = cables[index].prefix if cables else ()
            module = "benchmarks.propagation_worker"
            task = processes.start(
                module, "worker", index, cluster, arguments, self._directory, prefix
            )
            self._workers.append(task)
            self._add(task)

    def _add(self, task: processes.Task) -> None:
        self._tasks.append(task)

    def run(self, kind: str, steps: int, gbps: float = 0.0) -> Phase:
        """Lets all workers do some steps.

        Args:
            kind: "train", or "compute" for a step of a real model without exchange.
            steps: How many.
            gbps: Bandwidth of their links, for workers that limit them by themselves; 0 is none.

        Raises:
            ClusterFailedError: If a process fails, or not all are done in time.
        """
        number = self._tell({"kind": kind, "steps": steps, "gbps": gbps})
        service_before = self._service_cpu_seconds()
        files = [
            self._directory / f"phase_{number}.worker_{worker.index}.json"
            for worker in self._workers
        ]
        self._wait(files, f"{steps} steps at {gbps:g} Gb/s")
        results = [json.loads(file.read_text()) for file in files]
        cpu_seconds = self._service_cpu_seconds() - service_before
        cpu_seconds += sum(result["cpu_seconds"] for result in results)
        return Phase(
            _means([result["step_seconds"] for result in results]),
            _means([result["chain_seconds"] for result in results]),
            cpu_seconds / steps,
        )

    def finish(self) -> str:
        """Ends training.

        Returns:
            The hash of the variables, which all workers have in common.

        Raises:
            ClusterFailedError: If they do not.
        """
        self._tell({"kind": "end"})
        self._wait([worker.result_file for worker in self._workers], "all workers to end")
        hashes = {
            json.loads(worker.result_file.read_text())["variables_sha256"]
            for worker in self._workers
        }
        if len(hashes) != 1:
            raise processes.ClusterFailedError(
                f"Expected all workers to end with the same variables, got the hashes {hashes}; "
                "the times of such a job mean nothing, so look for the error in the strategy first."
            )
        while not all([worker.poll() for worker in self._workers]):
            self._check("all workers to exit")
            time.sleep(_POLL_SECONDS)
        return hashes.pop()

    def close(self) -> None:
        """Ends all processes. May be called twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.kill()
        self._temporary.cleanup()

    def _tell(self, phase: Mapping[str, Any]) -> int:
        number, self._phases = self._phases, self._phases + 1
        part = self._directory / "phase.part"
        part.write_text(json.dumps(phase))
        part.replace(self._directory / f"phase_{number}.json")
        return number

    def _wait(self, files: Sequence[pathlib.Path], what: str) -> None:
        while not all(file.exists() for file in files):
            self._check(what)
            time.sleep(_POLL_SECONDS)

    def _check(self, what: str) -> None:
        failed = [task for task in self._tasks if task.process.poll()]
        if failed or time.monotonic() > self._deadline:
            # The others say what they think of it.
            time.sleep(1.0 if failed else 0.0)
            why = f"{failed[0]} failed" if failed else "the deadline passed"
            logs = "\n".join(f"{task}:\n{task.log_tail()}" for task in self._tasks)
            raise processes.ClusterFailedError(
                f"Expected {what}, but {why}; raise --timeout_seconds if the machine is slow. "
                f"Logs:\n{logs}"
            )

    def _service_cpu_seconds(self) -> float:
        """Returns the processor time of the service's processes so far."""
        services = [task for task in self._tasks if task.task == "ps"]
        ticks = 0
        for service in services:
            # The name in front may have spaces, but not the rest.
            stat = pathlib.Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2]
            ticks += sum(map(int, stat.split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


def _means(lists: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*lists, strict=True)]
