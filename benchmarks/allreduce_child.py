"""What all processes of benchmarks.allreduce have in common: flags, deadline and result."""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks import tensors

_MEGABYTES = flags.DEFINE_float("megabytes", 1.0, "Size of the one tensor.")
_MODEL = flags.DEFINE_enum("model", "", ["", tensors.RESNET50], "Exchange its tensors instead.")
ROUNDS = flags.DEFINE_integer("rounds", 10, "Measured exchanges.")
WARMUP_ROUNDS = flags.DEFINE_integer("warmup_rounds", 5, "Exchanges before the measured ones.")
_GIVE_UP_AT = flags.DEFINE_float(
    "give_up_at", None, "time.time() when the process prints its stacks and exits.", required=True
)
_RESULT_FILE = flags.DEFINE_string("result_file", None, "Where the result goes, if given.")

Result = dict[str, Any]


class Task(NamedTuple):
    """This process's place in the cluster of TF_CONFIG."""

    kind: str
    index: int
    cluster: dict[str, list[str]]

    @property
    def num_workers(self) -> int:
        """How many workers there are."""
        return len(self.cluster["worker"])


def task() -> Task:
    """Returns this process's place in the cluster."""
    config = json.loads(os.environ["TF_CONFIG"])
    return Task(config["task"]["type"], config["task"]["index"], config["cluster"])


def shapes() -> list[tensors.Shape]:
    """Returns the shapes of the tensors of one exchange."""
    return tensors.shapes(_MODEL.value, _MEGABYTES.value)


def time_rounds(
    exchange: Callable[[int], object],
    before: Callable[[int], object] = lambda _: None,
    after: Callable[[int, object], None] = lambda *_: None,
) -> Result:
    """Makes all exchanges and returns how long each measured one took.

    Args:
        exchange: Called with the number of the exchange.
        before: Called before each exchange, not in the time.
        after: Called with the number and with what `exchange` returned, not in the time.
    """
    seconds = []
    started_at = time.time()
    for number in range(WARMUP_ROUNDS.value + ROUNDS.value):
        before(number)
        begin = time.perf_counter()
        found = exchange(number)
        seconds.append(time.perf_counter() - begin)
        after(number, found)
    return {"seconds": seconds[WARMUP_ROUNDS.value :], "started_at": started_at}


def missing(reason: object) -> Result:
    """Returns the result of a system that cannot be measured here."""
    return {"missing": str(reason)}


def limit_time() -> None:
    """Makes this process print its stacks and exit at its deadline."""
    # The smallest delay keeps a deadline that has passed already from being an invalid one.
    faulthandler.dump_traceback_later(max(0.1, _GIVE_UP_AT.value - time.time()), exit=True)


def run(measure: Callable[[], Result], forks: bool = False) -> None:
    """Runs `measure` as the program and writes the result that it returns.

    Args:
        measure: Returns the result.
        forks: Whether `measure` calls `limit_time` itself, after it has forked: a process that
            is forked after that call cannot make it for itself.
    """

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"Expected only flags, received {argv[1:]}; remove them.")
        if not forks:
            limit_time()
        result = measure()
        if _RESULT_FILE.value:
            pathlib.Path(_RESULT_FILE.value).write_text(json.dumps(result))

    app.run(main)
