"""The parts of benchmarks.mixing about jobs of several workers, with and without a slow one."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import mixing_rows, processes
from benchmarks.mixing_settings import Settings

STRATEGIES = (
    "sync_replicas",
    "model_averaging",
    "elastic_averaging",
    "gossip:pull",
    "gossip:push",
    "async",
)

Run = dict[str, Any]
Start = Callable[[dict[str, Any]], list[Run]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        strategies: Which of `STRATEGIES`.
        num_workers: Workers of each job, of which the last one may be slow.
        seeds: Seeds of jobs without a slow worker.
        straggler_seeds: Seeds of jobs with one. Each is compared with the job of the same seed
            without, which is run for them in any case.
        step_seconds: How long a step sleeps.
        slow_factor: How many times as long as an undelayed step a slow worker's takes.
        settings: How to train.
    """

    strategies: Sequence[str]
    num_workers: int
    seeds: int
    straggler_seeds: int
    step_seconds: float
    slow_factor: float
    settings: Settings


def measure(start: Start, plan: Plan) -> tuple[list[mixing_rows.Row], list[str]]:
    """Trains with all strategies in turn, and returns their rows and what has failed.

    Args:
        start: Starts processes.
        plan: What to measure.
    """
    undelayed: dict[str, list[Run]] = {}
    delayed: dict[str, list[Run]] = {}
    failed: dict[str, str] = {}
    for seed in range(max(plan.seeds, plan.straggler_seeds)):
        for strategy in plan.strategies:
            if strategy in failed:
                continue
            try:
                run = _run(start, plan, strategy, seed, 0.0)
                undelayed.setdefault(strategy, []).append(run)
                if seed < plan.straggler_seeds:
                    delay = (plan.slow_factor - 1) / run["steps_per_second"]
                    slowed = _run(start, plan, strategy, seed, delay)
                    slowed["rate_ratio"] = slowed["steps_per_second"] / run["steps_per_second"]
                    delayed.setdefault(strategy, []).append(slowed)
            except RuntimeError as error:
                failed[strategy] = f"{strategy}, seed {seed}: {error}"
                print(failed[strategy], file=sys.stderr, flush=True)
    rows = [_row(plan, strategy, runs, False) for strategy, runs in undelayed.items()]
    rows += [_row(plan, strategy, runs, True) for strategy, runs in delayed.items()]
    return rows, list(failed.values())


def learning_rate(strategy: str, settings: Settings, num_workers: int) -> float:
    """Returns the learning rate of each worker.

    The steps of the asynchronous parameter server add up, where others are averaged: without a
    smaller rate it diverges.
    """
    return settings.learning_rate / (num_workers if strategy == "async" else 1)


def _run(start: Start, plan: Plan, strategy: str, seed: int, delay_seconds: float) -> Run:
    """Runs a job and returns what it came to, with rates of the workers that may not be slow."""
    job = {
        "strategy": strategy,
        "seed": seed,
        "learning_rate": learning_rate(strategy, plan.settings, plan.num_workers),
        "step_seconds": plan.step_seconds,
        "delay_seconds": delay_seconds,
    }
    workers = start(
        {
            "job": job,
            "addresses": processes.free_addresses(plan.num_workers),
            "settings": plan.settings._asdict(),
        }
    )
    rates = [worker["steps"] / worker["seconds"] for worker in workers]
    run = {
        **workers[0],
        "seed": seed,
        "delay_seconds": delay_seconds,
        # The last one is left out in either case, so that rates are those of the same workers.
        "steps_per_second": statistics.median(rates[:-1]),
        "examples_per_second": plan.settings.batch_size
        * sum(worker["steps"] for worker in workers)
        / workers[0]["seconds"],
        "worker_rates": rates,
    }
    slow = f", last worker {delay_seconds:.3f} s slower" if delay_seconds else ""
    line = mixing_rows.line(run)
    print(f"{strategy}{slow}, seed {seed}: {line}", file=sys.stderr, flush=True)
    return run


def _row(plan: Plan, strategy: str, runs: Sequence[Run], straggler: bool) -> mixing_rows.Row:
    row = {
        "part": "stragglers" if straggler else "strategies",
        "strategy": strategy,
        "workers": plan.num_workers,
        "learners": plan.num_workers,
        "auto": False,
        "devices": 1,
        "batch_size": plan.settings.batch_size
        * (plan.num_workers if strategy == "sync_replicas" else 1),
        "straggler": straggler,
        "step_seconds": plan.step_seconds,
        "learning_rate": learning_rate(strategy, plan.settings, plan.num_workers),
        **mixing_rows.medians(runs),
    }
    if straggler:
        row["rate_ratio"] = statistics.median(run["rate_ratio"] for run in runs)
    return row
