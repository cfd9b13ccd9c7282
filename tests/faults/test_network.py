"""A worker on a machine of its own, whose cable is pulled for a while."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .injector import Faults
from .jobs import FaultyJob
from .network import Machine, why_not

pytestmark = pytest.mark.timeout(200)

ROUNDS = 80


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine for a worker, where one can be made."""
    if reason := why_not():
        pytest.skip(reason)
    with Machine() as made:
        yield made


def test_the_others_go_on_and_it_comes_back(tmp_path: Path, machine: Machine) -> None:
    plan = Faults().cut(worker=1, at_round=10, seconds=5.0).cut(worker=1, at_round=50, seconds=1.0)
    arguments = {"rounds": ROUNDS, "step_seconds": 0.15, "transport": "grpc"}
    with FaultyJob(
        "loop.py", tmp_path, workers=3, plan=plan, arguments=arguments, machine=machine
    ) as job:
        job.run().check_alike(ROUNDS)
        assert sorted(job.results()) == [0, 1, 2]
        cut = [at for at, _ in job.applied]
        assert len(cut) == 2
        local = job.results()[1]["local"]
        assert local["contributed"] > 0


def test_a_machine_is_removed_and_may_be_closed_twice(machine: Machine) -> None:
    machine.cut()
    machine.heal()
    machine.close()
    machine.close()
    with pytest.raises(RuntimeError):
        machine.cut()
