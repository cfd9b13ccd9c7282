"""Failed tasks that are started again."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tf_syncdist.cluster.guard import OrphanGuard
from tf_syncdist.cluster.launcher import Job
from tf_syncdist.cluster.ports import reserve_ports
from tf_syncdist.cluster.relay import Relay
from tf_syncdist.cluster.restarts import Restarts
from tf_syncdist.cluster.task import RESTARTS_VARIABLE, Task

pytestmark = pytest.mark.timeout(60)

Launch = Callable[..., Any]

WHO = f"""
    import json, os, signal, socket, sys, time
    config = json.loads(os.environ["TF_CONFIG"])
    index = config["task"]["index"]
    restarts = int(os.environ["{RESTARTS_VARIABLE}"])
    print("life", restarts, config["cluster"]["worker"][index])
"""


def launcher_lines(job: Any) -> list[str]:
    return [line for line in job.lines if line.startswith("[launcher]")]


def test_failed_workers_are_started_again_with_the_same_place_and_port(launch: Launch) -> None:
    script = (
        WHO
        + """
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", int(config["cluster"]["worker"][index].rpartition(":")[2])))
    server.listen()
    if index == 1 and restarts < 2:
        if restarts:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(3)
    """
    )
    job = launch(script, "--num_workers=3", "--max_restarts=2", "script.py")
    assert job.wait() == 0
    lives = job.wait_for(r"\[worker (\d)\] life (\d) (\S+)\n", 5)
    assert sorted(life[:2] for life in lives) == [
        ("0", "0"),
        ("1", "0"),
        ("1", "1"),
        ("1", "2"),
        ("2", "0"),
    ]
    assert len({address for worker, _, address in lives if worker == "1"}) == 1
    assert launcher_lines(job) == [
        "[launcher] worker 1 failed with exit code 3; starting it again in 0.5 s (1 of 2)",
        "[launcher] worker 1 was killed by SIGKILL; starting it again in 1 s (2 of 2)",
    ]


def test_a_task_that_is_out_of_restarts_is_a_failure(launch: Launch) -> None:
    script = WHO + "    if index == 1: sys.exit(5 + restarts)\n"
    job = launch(script, "--num_workers=2", "--max_restarts=1", "script.py")
    assert job.wait() == 6
    assert launcher_lines(job) == [
        "[launcher] worker 1 failed with exit code 5; starting it again in 0.5 s (1 of 1)",
        "[launcher] worker 1 failed with exit code 6",
        "[launcher] job failed: worker 1 failed with exit code 6",
    ]


def test_without_restarts_a_failed_worker_is_reported_and_the_others_finish(
    launch: Launch, tmp_path: Path
) -> None:
    script = (
        WHO
        + """
    if index == 1:
        sys.exit(4)
    while not os.path.exists("go"):
        time.sleep(0.02)
    print("finished")
    """
    )
    job = launch(script, "--num_workers=3", "script.py")
    job.wait_for("worker 1 failed with exit code 4")
    (tmp_path / "go").touch()
    assert job.wait() == 4
    assert len(job.wait_for("finished\n", 2)) == 2
    assert len(job.wait_for("life")) == 3


def test_the_others_need_not_run_any_more(launch: Launch) -> None:
    script = WHO + "    sys.exit(index == 0 and not restarts)\n"
    job = launch(script, "--num_workers=2", "--max_restarts=1", "script.py")
    assert job.wait() == 0
    assert len(job.wait_for("life")) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_the_launcher_ends_is_not_started_again(
    launch: Launch, number: signal.Signals
) -> None:
    script = (
        WHO
        + """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if index == 1:
        sys.exit(1)
    time.sleep(100)
    """
    )
    flags = ("--num_workers=2", "--max_restarts=50", "--grace_seconds=40", "script.py")
    job = launch(script, *flags)
    # Its fourth life begins after 3.5 s, and the signal comes in the pause of 4 s that follows.
    job.wait_for(r"starting it again in 4 s \(4 of 50\)")
    job.process.send_signal(number)
    assert job.wait() == 128 + number
    *_, sent, stopped = launcher_lines(job)
    # Unless this process was held up for just so long that the next life has begun.
    words = f"[launcher] sent {number.name} to worker 0"
    assert sent in (words, words + ", worker 1")
    assert stopped == f"[launcher] job was stopped by {number.name}"


def test_the_first_failure_beyond_restarts_can_stop_the_job(launch: Launch) -> None:
    script = (
        WHO
        + """
    if index == 0:
        open("up", "w").close()
        time.sleep(100)
    while not os.path.exists("up"):
        time.sleep(0.02)
    sys.exit(1)
    """
    )
    flags = ("--num_workers=2", "--max_restarts=1", "--stop_on_failure", "script.py")
    job = launch(script, *flags)
    assert job.wait() == 1
    assert "[launcher] sent SIGTERM to worker 0" in job.lines
    assert len(job.wait_for("life")) == 3


def test_a_negative_number_is_refused_in_one_line(launch: Launch) -> None:
    job = launch("", "--num_workers=1", "--max_restarts=-1", "script.py")
    assert job.wait() == 2
    (line,) = job.lines
    assert "max_restarts=-1" in line


def run(tmp_path: Path, worker: str, service: str, max_restarts: int = 1) -> int:
    """Runs a job of one worker and one service, each of them given as code."""
    with reserve_ports(2) as ports, Relay(False) as relay, OrphanGuard() as guard:
        tasks = [
            Task(name, 0, [sys.executable, "-c", code], {**os.environ, "AT": str(tmp_path)}, port)
            for name, code, port in (("worker", worker, ports[0]), ("ps", service, ports[1]))
        ]
        return Job(tasks, relay, guard, 30.0, False, Restarts(max_restarts)).run()


LIVES = f"""
import os, pathlib, sys, time
at, restarts = pathlib.Path(os.environ["AT"]), int(os.environ["{RESTARTS_VARIABLE}"])

def until(name):
    deadline = time.monotonic() + 40
    while not (at / name).exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.02)

def tell_pid(name):
    (at / "unfinished").write_text(str(os.getpid()))
    (at / "unfinished").rename(at / name)

def until_gone(name):
    # Gone is a process of which the launcher knows that it has ended.
    until(name)
    deadline = time.monotonic() + 40
    try:
        while True:
            os.kill(int((at / name).read_text()), 0)
            assert time.monotonic() < deadline, name
            time.sleep(0.02)
    except ProcessLookupError:
        pass
"""


def test_a_service_is_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    service = LIVES + "(at / f'served-{restarts}').touch(); sys.exit(1 - restarts)"
    assert run(tmp_path, LIVES + "until('served-1')", service) == 0
    want = ["[launcher] ps 0 failed with exit code 1; starting it again in 0.5 s (1 of 1)"]
    assert capfd.readouterr().err.splitlines() == want


def test_a_service_that_ended_without_workers_serves_again_with_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    service = LIVES + "tell_pid(f'served-{(at / \"failed\").exists()}')"
    worker = LIVES + "until_gone('served-False'); (at / 'failed').touch(); "
    worker += "until('served-True') if restarts else sys.exit(1)"
    assert run(tmp_path, worker, service) == 0
    assert capfd.readouterr().err.splitlines() == [
        "[launcher] worker 0 failed with exit code 1; starting it again in 0.5 s (1 of 1)",
        "[launcher] starting ps 0 again for worker 0",
    ]


def test_a_service_is_not_started_again_without_workers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    service = LIVES + "(at / 'up').touch(); until_gone('done'); sys.exit(7)"
    assert run(tmp_path, LIVES + "until('up'); tell_pid('done')", service) == 7
    assert capfd.readouterr().err.splitlines() == [
        "[launcher] ps 0 failed with exit code 7",
        "[launcher] job failed: ps 0 failed with exit code 7",
    ]
