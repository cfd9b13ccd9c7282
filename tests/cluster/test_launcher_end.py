"""How a job ends: by signals, by force, and with its launcher."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tf_syncdist.cluster.guard import OrphanGuard
from tf_syncdist.cluster.launcher import Job
from tf_syncdist.cluster.ports import reserve_ports
from tf_syncdist.cluster.relay import Relay
from tf_syncdist.cluster.task import Task

pytestmark = pytest.mark.timeout(60)

Launch = Callable[..., Any]

# Ends after some time in any case, so that a failing test leaves nothing behind for long.
STAY = "threading.Event().wait(100)"


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_reaches_each_task_exactly_once(
    launch: Launch, signum: signal.Signals, status: int
) -> None:
    script = f"""
        import os, signal, sys, time
        received = []
        signal.signal({int(signum)}, lambda *_: received.append(1))
        print("ready")
        while not received:
            time.sleep(0.02)
        time.sleep(0.3)
        print("received", len(received))
    """
    job = launch(script, "--num_workers=2", "--grace_seconds=40", "script.py")
    job.wait_for("ready", 2)
    # To the whole group, as a terminal does it.
    os.killpg(job.process.pid, signum)
    assert job.wait() == status
    assert sorted(line for line in job.lines if "received" in line) == [
        "[worker 0] received 1",
        "[worker 1] received 1",
    ]
    assert job.lines[-1] == f"[launcher] job was stopped by {signum.name}"
    assert "failed" not in job.text


STUBBORN = f"""
    import signal, threading
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: print("no to", signum))
    print("ready")
    {STAY}
"""


def test_a_stubborn_task_is_killed_in_the_end(launch: Launch) -> None:
    # When it is stopped, its output has as long as that and a second more to be written.
    job = launch(STUBBORN, "--num_workers=2", "--grace_seconds=1.5", "script.py")
    job.wait_for("ready", 2)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 130
    assert [line for line in job.lines if line.startswith("[launcher]")] == [
        "[launcher] sent SIGINT to worker 0, worker 1",
        "[launcher] sent SIGTERM to worker 0, worker 1",
        "[launcher] sent SIGKILL to worker 0, worker 1",
        "[launcher] job was stopped by SIGINT",
    ]


def test_further_signals_make_it_faster(launch: Launch) -> None:
    job = launch(STUBBORN, "--num_workers=1", "--grace_seconds=1000", "script.py")
    job.wait_for("ready")
    for name in ("SIGINT", "SIGTERM", "SIGKILL"):
        job.process.send_signal(signal.SIGINT)
        job.wait_for(f"sent {name} to worker 0\n")
    assert job.wait() == 130


def is_alive(pid: int) -> bool:
    """Says whether a process runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        return True
    except (ProcessLookupError, FileNotFoundError):
        return False


def assert_they_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 45
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still alive: {left}"
        threading.Event().wait(0.05)


WITH_CHILD = f"""
    import os, signal, subprocess, sys, threading
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import threading; {STAY}"])
    print("pids", os.getpid(), child.pid)
"""


def pids_of(job: Any, workers: int) -> list[int]:
    found = job.wait_for(r"pids (\d+) (\d+)\n", workers)
    pids = [int(pid) for pair in found for pid in pair]
    assert len(pids) == 2 * workers
    return pids


def test_no_process_survives_a_killed_launcher(launch: Launch) -> None:
    job = launch(WITH_CHILD + f"    {STAY}\n", "--num_workers=2", "script.py")
    pids = pids_of(job, 2)
    assert all(map(is_alive, pids))
    job.process.kill()
    assert_they_end(pids)


def test_no_process_survives_a_launcher_that_is_killed_while_it_starts(
    launch: Launch, tmp_path: Path
) -> None:
    script = f"""
        import os, threading
        open(f"pid-{{os.getpid()}}", "w").close()
        {STAY}
    """
    for _ in range(3):
        job = launch(script, "--num_workers=8", "script.py")
        deadline = time.monotonic() + 45
        while not list(tmp_path.glob("pid-*")) and time.monotonic() < deadline:
            threading.Event().wait(0.005)
        job.process.kill()
        # The launcher's output ends when the last process that could write to its pipes is gone.
        job.wait()
        threading.Event().wait(0.2)
        files = list(tmp_path.glob("pid-*"))
        assert files
        assert_they_end([int(path.name[4:]) for path in files])
        for path in files:
            path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of this")
def test_no_worker_survives_a_killed_launcher_and_watchdog(launch: Launch) -> None:
    job = launch(WITH_CHILD + f"    {STAY}\n", "--num_workers=1", "script.py")
    worker, child = pids_of(job, 1)
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text()
    (watchdog,) = set(map(int, children.split())) - {worker}
    os.kill(watchdog, signal.SIGKILL)
    job.process.kill()
    assert_they_end([worker])
    # What the worker has started was the watchdog's affair.
    os.kill(child, signal.SIGKILL)


def test_what_a_task_leaves_behind_ends_with_it(launch: Launch) -> None:
    job = launch(WITH_CHILD, "--num_workers=2", "script.py")
    assert job.wait() == 0
    assert_they_end(pids_of(job, 2))


def test_a_daemon_that_holds_the_output_open_does_not_hold_up_the_job(launch: Launch) -> None:
    script = f"""
        import subprocess, sys
        code = "import threading; {STAY}"
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        print("daemon", child.pid, end="")
    """
    job = launch(script, "--num_workers=1", "script.py")
    assert job.wait() == 0
    (daemon,) = job.wait_for(r"daemon (\d+)\n")
    os.kill(int(daemon), signal.SIGKILL)


@pytest.mark.parametrize("ps_ignores", [False, True])
def test_a_service_that_stays_is_stopped_after_the_last_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ps_ignores: bool
) -> None:
    ready = tmp_path / "ready"
    service = (
        "import pathlib, signal, threading\n"
        f"if {ps_ignores}: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        f"{STAY}"
    )
    worker = f"import os, time\nwhile not os.path.exists({str(ready)!r}): time.sleep(0.02)"
    with reserve_ports(2) as ports, Relay(False) as relay, OrphanGuard() as guard:
        tasks = [
            Task(name, 0, [sys.executable, "-c", code], os.environ, port)
            for name, code, port in (("worker", worker, ports[0]), ("ps", service, ports[1]))
        ]

        def clock() -> float:
            # Stands still for a service that heeds SIGTERM, but may be long about it.
            return 0.0 if tasks[1].signalled and not ps_ignores else time.monotonic()

        assert Job(tasks, relay, guard, 0.3, False, clock=clock).run() == 0
    said = capfd.readouterr().err.splitlines()
    want = ["[launcher] sent SIGTERM to ps 0", "[launcher] sent SIGKILL to ps 0"]
    assert said == want[: 1 + ps_ignores]


def test_a_task_that_cannot_start_leaves_no_other_behind(tmp_path: Path) -> None:
    class Unstartable(Task):
        def start(self, guard: OrphanGuard, relay: Relay) -> None:
            raise OSError("no room")

    with reserve_ports(2) as ports, Relay(False) as relay, OrphanGuard() as guard:
        command = [sys.executable, "-c", f"import threading; {STAY}"]
        first = Task("worker", 0, command, os.environ, ports[0])
        second = Unstartable("worker", 1, command, os.environ, ports[1])
        # By this clock the launcher does not give up.
        job = Job([first, second], relay, guard, 0.3, False, clock=lambda: 0.0)
        with pytest.raises(OSError, match="no room"):
            job.run()
        assert first.returncode == -signal.SIGKILL
