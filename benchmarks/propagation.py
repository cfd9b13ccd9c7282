"""Measures what the order in which gradients travel is worth on links of limited bandwidth.

    python -m benchmarks.propagation --json_out=propagation.json
    python -m benchmarks.propagation --models=vgg19 --modes=fifo,priority --plot=speedup.png
    python -m benchmarks.propagation --modes=priority --slice_elements=5000,50000 --ratios=0.85

Two workers and a service on this machine train models that have the layers of VGG-19 and
ResNet-50, scaled down (see propagation_models.py). A synthetic step does not compute: each layer
sleeps for its share of --compute_seconds, forward and backward, and yields a gradient of its size,
so the cores of the machine, which have to send and add, do not decide. What waits for what is as in
a real model: a variable that comes late delays the layer that reads it, not the ones before it.

Modes:

* no_overlap: everything is sent when the last gradient is there;
* fifo: as soon as it is there, in the order of backpropagation, and the step waits for all of it;
  this is the strategy's default;
* sliced: the same in slices of --slice_elements;
* priority: in such slices, the first layers' first, and the next forward pass begins meanwhile.

A link's bandwidth is limited in each direction. As root every worker lives in a network namespace
whose cable has a token bucket at either end (`tc tbf`), and the service is not limited. Elsewhere,
or with --limiter=bucket, the strategy's transport limits itself (`limit_gbps`). Bandwidths are
chosen by the ratio of exchange to computing, where the exchange is the time that the model's bytes
take in one direction; 0 is a link without limit. "link Gb/s" is what a plain TCP connection moved
each way over the same links before.

"step s" is the median of the measured steps, "over fifo" the speed-up over that mode (1.25: a step
takes four fifths of the time), and "bound" the ratio to the longer one of computing and exchange,
below which no order can come. "cpu s" is the processor time of all processes per step: where it
comes near the step times the number of cores, the figures are about this machine.

All modes have to end with the same bits, which is checked where that is certain: with two workers
and synthetic steps.

In the rows of --json_out gbps, ratio and exchange_seconds are 0 on a link without limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from benchmarks import links, processes, propagation_clock, propagation_job, propagation_rows
from benchmarks.propagation_models import MODELS, Model

_NUM_WORKERS = flags.DEFINE_integer("num_workers", 2, "Workers.", lower_bound=2)
_NUM_SHARDS = flags.DEFINE_integer("num_shards", 1, "Processes of the service.", lower_bound=1)
_MODELS = flags.DEFINE_list("models", list(MODELS), "Which models: vgg19, resnet50.")
_MODES = flags.DEFINE_list("modes", propagation_rows.MODES, "Which modes.")
_RATIOS = flags.DEFINE_list(
    "ratios",
    ["0", "0.25", "0.5", "0.85", "1.2"],
    "Bandwidths, by the ratio of exchange to computing that they lead to; 0 is without limit.",
)
_GBPS = flags.DEFINE_list("gbps", [], "Bandwidths in Gb/s in place of --ratios; 0 is without.")
_COMPUTE = flags.DEFINE_enum(
    "compute",
    "synthetic",
    ["synthetic", "real"],
    "Whether layers sleep, or are those of Keras, on images of 224 x 224 pixels.",
)
_COMPUTE_SECONDS = flags.DEFINE_float(
    "compute_seconds", 0.8, "Computing of a synthetic step.", lower_bound=0.01
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 4, "Images that a worker computes in a real step.", lower_bound=1
)
_STEPS = flags.DEFINE_integer("steps", 5, "Measured steps of each case.", lower_bound=1)
_WARMUP_STEPS = flags.DEFINE_integer(
    "warmup_steps", 2, "Steps before them, after each change of the bandwidth.", lower_bound=0
)
_SLICE_ELEMENTS = flags.DEFINE_list(
    "slice_elements",
    ["50000"],
    "Sizes of slices: mode priority is measured with all of them, mode sliced with the first.",
)
_CREDIT_BYTES = flags.DEFINE_integer(
    "credit_bytes", 0, "Credit of mode priority; 0 is the strategy's default.", lower_bound=0
)
_LIMITER = flags.DEFINE_enum(
    "limiter", "auto", ["auto", "tc", "bucket"], "What limits links; auto: tc where it can be used."
)
_BUDGET_SECONDS = flags.DEFINE_float(
    "budget_seconds",
    510,
    "While the run is behind a schedule that ends after so long, cases get 3 steps, so that a slow "
    "machine ends in time; 0 is no schedule.",
    lower_bound=0,
)
_TIMEOUT_SECONDS = flags.DEFINE_float(
    "timeout_seconds", 300, "Deadline of one model in one mode.", lower_bound=1
)
_TIMELINE = flags.DEFINE_string(
    "timeline", None, "Directory for the strategy's timelines, one per model and mode, if given."
)
_JSON_OUT = flags.DEFINE_string("json_out", None, "File for the rows, if given.")
_PLOT = flags.DEFINE_string("plot", None, "File for a figure, if given; needs matplotlib.")

_FIRST_STEPS = 2
_PROBE_SECONDS = 0.5

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is measured by one set of processes, over all bandwidths.

    Args:
        model: Name of the model.
        mode: How gradients travel.
        slice_elements: For the modes that have slices, else `None`.
    """

    model: str
    mode: str
    slice_elements: int | None

    def __str__(self) -> str:
        slices = f", slices of {self.slice_elements} elements" if self.slice_elements else ""
        return f"{self.model}, {self.mode}{slices}"

    @property
    def flags(self) -> list[str]:
        """Flags of a worker."""
        names = [f"--model={self.model}", f"--mode={self.mode}"]
        if self.slice_elements:
            names.append(f"--slice_elements={self.slice_elements}")
        if _TIMELINE.value:
            size = f".{self.slice_elements}" if self.slice_elements else ""
            file = f"trace.{self.model}.{self.mode}{size}.json"
            names.append(f"--timeline={pathlib.Path(_TIMELINE.value).absolute() / file}")
        return names


@contextlib.contextmanager
def _network() -> Iterator[links.Network]:
    """Makes the links, and removes them."""
    reason = "--limiter=bucket" if _LIMITER.value == "bucket" else links.why_not()
    if reason and _LIMITER.value == "tc":
        raise app.UsageError(f"Expected links that can be limited, but {reason}.")
    if reason:
        _say(f"the transport limits itself: {reason}")
    with links.Network(0 if reason else _NUM_WORKERS.value) as network:
        yield network


def _configurations() -> list[Configuration]:
    """Returns what to measure."""
    sizes = {"sliced": _sizes()[:1], "priority": _sizes()}
    return [
        Configuration(model, mode, size)
        for model in _MODELS.value
        for mode in _MODES.value
        for size in sizes.get(mode, [None])
    ]


def _sizes() -> list[int]:
    return [int(size) for size in _SLICE_ELEMENTS.value]


def _bandwidths(model: Model, compute_seconds: float) -> list[float]:
    """Returns the bandwidths to measure a model at, in Gb/s; 0 is without limit."""
    if _GBPS.value:
        return [float(gbps) for gbps in _GBPS.value]
    return [model.gbps(float(ratio), compute_seconds) for ratio in _RATIOS.value]


def _measure(
    configuration: Configuration,
    network: links.Network,
    schedule: propagation_clock.Schedule,
    compute_seconds: dict[str, float],
) -> tuple[list[Row], int, str]:
    """Starts the processes of a configuration and takes them through all bandwidths.

    Args:
        configuration: What to measure.
        network: The links.
        schedule: Whether there is time.
        compute_seconds: What the computing of a model's step takes; added to for real layers.

    Returns:
        A row for each bandwidth, how many steps there were in all, and the hash of the variables.
    """
    model = MODELS[configuration.model]()
    if configuration.model in compute_seconds:
        # Before there are processes that would share the links.
        for gbps in _bandwidths(model, compute_seconds[configuration.model]):
            try:
                network.measure(gbps, _PROBE_SECONDS)
            except RuntimeError as error:
                _say(f"what a link of {gbps:g} Gb/s moves is not known: {error}")
    network.limit(0)
    worker_flags = [
        *configuration.flags,
        f"--compute={_COMPUTE.value}",
        f"--compute_seconds={_COMPUTE_SECONDS.value}",
        f"--batch_size={_BATCH_SIZE.value}",
        f"--credit_bytes={_CREDIT_BYTES.value}",
        f"--has_bucket={'false' if network.cables else 'true'}",
    ]
    rows: list[Row] = []
    job = propagation_job.Job(
        worker_flags,
        _NUM_WORKERS.value,
        _NUM_SHARDS.value,
        network.cables,
        _TIMEOUT_SECONDS.value,
    )
    with job:
        job.run("train", _FIRST_STEPS)
        if configuration.model not in compute_seconds:
            phase = job.run("compute", _FIRST_STEPS + _STEPS.value)
            seconds = statistics.median(phase.step_seconds[_FIRST_STEPS:])
            compute_seconds[configuration.model] = seconds
        total = _FIRST_STEPS
        computing = compute_seconds[configuration.model]
        for gbps in _bandwidths(model, computing):
            steps = _WARMUP_STEPS.value + schedule.next_steps()
            network.limit(gbps)
            phase = job.run("train", steps, gbps)
            total += steps
            rows.append(_row(configuration, model, gbps, computing, phase, network))
        return rows, total, job.finish()


def _row(
    configuration: Configuration,
    model: Model,
    gbps: float,
    compute_seconds: float,
    phase: propagation_job.Phase,
    network: links.Network,
) -> Row:
    """Returns what was measured of a configuration at one bandwidth."""
    measured = phase.step_seconds[_WARMUP_STEPS.value :]
    chains = phase.chain_seconds[_WARMUP_STEPS.value :]
    exchange_seconds = model.exchange_seconds(gbps)
    step_seconds = statistics.median(measured)
    return {
        **dataclasses.asdict(configuration),
        "gbps": gbps,
        "ratio": exchange_seconds / compute_seconds,
        "compute_seconds": compute_seconds,
        "exchange_seconds": exchange_seconds,
        "step_seconds": step_seconds,
        "bound": step_seconds / max(compute_seconds, exchange_seconds),
        "measured_steps": measured,
        "chain_seconds": statistics.median(chains) if chains else None,
        "cpu_seconds": phase.cpu_seconds,
        "link_gbps": network.measured.get(gbps),
        "limiter": "tc" if network.cables else "bucket",
        "compute": _COMPUTE.value,
        "workers": _NUM_WORKERS.value,
        "shards": _NUM_SHARDS.value,
        "credit_bytes": _CREDIT_BYTES.value or None,
        "parameters": model.parameters,
    }


def _measure_all(network: links.Network) -> tuple[list[Row], list[str]]:
    """Returns the rows of all configurations, and what failed."""
    configurations = _configurations()
    cases = len(configurations) * len(_GBPS.value or _RATIOS.value)
    schedule = propagation_clock.Schedule(cases, _STEPS.value, _BUDGET_SECONDS.value)
    compute_seconds = {}
    if _COMPUTE.value == "synthetic":
        compute_seconds = dict.fromkeys(_MODELS.value, _COMPUTE_SECONDS.value)
    rows: list[Row] = []
    failures: list[str] = []
    hashes: dict[tuple[str, int], tuple[str, Configuration]] = {}
    for configuration in configurations:
        _say(f"measuring {configuration} ...")
        try:
            new, steps, sha256 = _measure(configuration, network, schedule, compute_seconds)
        except processes.ClusterFailedError as error:
            failures.append(f"failed: {configuration}: {error}")
            _say(failures[-1])
            continue
        rows = propagation_rows.with_speedups([*rows, *new])
        if _JSON_OUT.value:
            # What is there already is worth having if the rest fails.
            pathlib.Path(_JSON_OUT.value).write_text(json.dumps(rows, indent=2))
        other, first = hashes.setdefault((configuration.model, steps), (sha256, configuration))
        # More workers are added in the order of arrival, and real layers may not be deterministic.
        is_certain = _COMPUTE.value == "synthetic" and _NUM_WORKERS.value == 2
        if other != sha256 and is_certain:
            failures.append(
                f"failed: after {steps} steps {configuration} has other variables than {first}, "
                "although only the order differs in which their gradients travel"
            )
            _say(failures[-1])
    return rows, failures


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_flags(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
    for flag, known in ((_MODELS, list(MODELS)), (_MODES, propagation_rows.MODES)):
        if not flag.value or not set(flag.value) <= set(known):
            raise app.UsageError(
                f"Expected --{flag.name} to list some of {known}, received {flag.value}."
            )
    for flag in (_RATIOS, _GBPS, _SLICE_ELEMENTS):
        try:
            wrong = any(float(text) < 0 for text in flag.value)
        except ValueError:
            wrong = True
        if wrong:
            raise app.UsageError(
                f"Expected --{flag.name} to list numbers that are not negative, received "
                f"{flag.value}."
            )
    if _TIMELINE.value:
        pathlib.Path(_TIMELINE.value).mkdir(parents=True, exist_ok=True)
    if _PLOT.value:
        # Now rather than after ten minutes.
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise app.UsageError(
                "Expected matplotlib for --plot, received none; install it."
            ) from None


def main(argv: Sequence[str]) -> None:
    """Measures all configurations, prints the table and writes the rows."""
    _check_flags(argv)
    # Namespaces outlive a process that is ended by a signal without any more ado.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with _network() as network:
        rows, failures = _measure_all(network)
    print(propagation_rows.table(rows))
    print("\n".join(["", *(failure.splitlines()[0] for failure in failures)]))
    if _PLOT.value:
        from benchmarks import propagation_plot

        propagation_plot.plot(rows, _PLOT.value)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
