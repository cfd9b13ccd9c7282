"""The launcher with real processes: how it starts them, what it passes on, how it ends."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Launch = Callable[..., Any]

pytestmark = pytest.mark.timeout(60)


def test_tf_config_and_arguments_of_each_worker(launch: Launch) -> None:
    script = """
        import json, os, sys
        print(json.dumps([os.environ["TF_CONFIG"], sys.argv[1:], os.environ["PYTHONUNBUFFERED"]]))
    """
    flags = ("--num_workers=9", "-m", "x y", "--", "")
    job = launch(script, "--num_workers", "3", "script.py", *flags)
    assert job.wait() == 0
    seen = {}
    for line in job.lines:
        label, index, text = re.fullmatch(r"(\[worker (\d)\]) (.*)", line).groups()
        config, arguments, unbuffered = json.loads(text)
        config = json.loads(config)
        assert config["task"] == {"type": "worker", "index": int(index)}
        assert list(config["cluster"]) == ["worker"]
        assert arguments == list(flags)
        assert unbuffered == "1"
        seen[label] = tuple(config["cluster"]["worker"])
    assert len(seen) == 3
    (addresses,) = set(seen.values())
    assert len(set(addresses)) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses)


def test_credentials_in_the_environment_reach_workers_and_services(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = Path(__file__).parents[1] / "certificates"
    monkeypatch.setenv("TF_SYNCDIST_TOKEN", "a secret")
    monkeypatch.setenv("TF_SYNCDIST_TLS_CA", str(certificates / "ca.pem"))
    monkeypatch.setenv("TF_SYNCDIST_TLS_CERT", str(certificates / "task.pem"))
    monkeypatch.setenv("TF_SYNCDIST_TLS_KEY", str(certificates / "task.key"))
    script = """
        import json, os
        from tf_syncdist import cutoff
        from tf_syncdist.transport.credentials import Credentials
        from tf_syncdist.transport.session import Session, SessionConfig
        config = json.loads(os.environ["TF_CONFIG"])["cluster"]
        policy = cutoff.serialize(cutoff.FullSync())
        credentials = Credentials.from_environment()
        config = SessionConfig(tuple(config["ps"]), 0, 1, policy, credentials=credentials)
        config = config._replace(detection_seconds=30.0)
        session = Session(config, print)
        print(credentials.token, credentials.uses_tls, session.report().rounds)
        session.close()
        plain = config._replace(credentials=Credentials(), connect_timeout_seconds=1.0)
        try:
            Session(plain, print)
        except ConnectionError as e:
            print(type(e).__name__)
    """
    job = launch(script, "--num_workers=1", "--num_ps=1", "script.py")
    assert job.wait() == 0
    own = [line for line in job.lines if line.startswith("[worker 0]")]
    assert own == ["[worker 0] a secret True 0", "[worker 0] AggregatorUnreachableError"]


def test_a_module_can_be_run(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "mod.py").write_text("import sys; print(__name__, sys.argv[1:])")
    job = launch("", "--num_workers=1", "-m", "pack.mod", "--num_ps=7")
    assert job.wait() == 0
    assert job.lines == ["[worker 0] __main__ ['--num_ps=7']"]


def test_workers_import_the_package_from_a_checkout_and_can_bind_their_ports(
    launch: Launch,
) -> None:
    script = """
        import json, os, socket
        import tf_syncdist.cluster.ports
        config = json.loads(os.environ["TF_CONFIG"])
        own = config["cluster"]["worker"][config["task"]["index"]]
        host, port = own.split(":")
        server = socket.socket()
        server.bind((host, int(port)))
        server.listen()
        print("bound")
    """
    job = launch(script, "--num_workers=2", "script.py")
    assert job.wait() == 0
    assert sorted(job.lines) == ["[worker 0] bound", "[worker 1] bound"]


def test_two_launchers_at_once_use_different_ports(launch: Launch, tmp_path: Path) -> None:
    script = """
        import os, pathlib, time
        print(os.environ["TF_CONFIG"])
        while not pathlib.Path("end").exists():
            time.sleep(0.02)
    """
    one = launch(script, "--num_workers=3", "script.py")
    other = launch(script, "--num_workers=3", "script.py")
    ports = {
        port
        for job in (one, other)
        for line in job.wait_for(r"\[worker 0\] (.*)\n")
        for port in re.findall(r"127\.0\.0\.1:(\d+)", line)
    }
    (tmp_path / "end").touch()
    assert one.wait() == other.wait() == 0
    assert len(ports) == 6


def test_lines_of_tasks_do_not_mix(launch: Launch) -> None:
    script = """
        import json, os, sys
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        for line in range(300):
            stream = sys.stderr if line % 2 else sys.stdout
            for part in range(6):
                stream.write(f"{index}-{line}-{part}.")
            stream.write("\\n")
    """
    job = launch(script, "--num_workers=4", "script.py")
    assert job.wait() == 0
    for index in range(4):
        for odd in (0, 1):
            want = [
                f"[worker {index}] " + "".join(f"{index}-{line}-{part}." for part in range(6))
                for line in range(odd, 300, 2)
            ]
            assert [line for line in job.lines if line in set(want)] == want
    assert len(job.lines) == 4 * 300


def test_a_line_is_passed_on_at_once(launch: Launch, tmp_path: Path) -> None:
    script = """
        import pathlib, time
        print("first")
        while not pathlib.Path("seen").exists():
            time.sleep(0.02)
        print("second")
    """
    job = launch(script, "--num_workers=1", "script.py")
    job.wait_for(r"\[worker 0\] first\n")
    (tmp_path / "seen").touch()
    assert job.wait() == 0
    assert job.lines == ["[worker 0] first", "[worker 0] second"]


def test_a_progress_bar_is_kept_in_its_last_state(launch: Launch) -> None:
    script = """
        import sys
        for percent in range(101):
            sys.stdout.write("\\b" * 20 + f"\\r{percent}% done")
        sys.stdout.write("\\n")
    """
    job = launch(script, "--num_workers=2", "script.py")
    assert job.wait() == 0
    assert sorted(job.lines) == ["[worker 0] 100% done", "[worker 1] 100% done"]


def test_any_bytes_and_a_last_line_without_newline_are_passed_on(launch: Launch) -> None:
    script = r"""
        import os
        os.write(1, b"\xff\xfe\n\n" + b"x" * 300_000 + b"\nunfinished \xc3")
    """
    job = launch(script, "--num_workers=1", "script.py")
    assert job.wait() == 0
    label = b"[worker 0] "
    assert job.data.split(b"\n") == [
        label + b"\xff\xfe",
        label,
        label + b"x" * 300_000,
        label + b"unfinished \xc3",
        b"",
    ]


@pytest.mark.parametrize("drop", [True, False])
def test_startup_chatter_is_dropped_from_stderr_only(launch: Launch, drop: bool) -> None:
    script = """
        import sys
        chatter = "I0000 00:00:1795168143.549221    2800 port.cc:153] oneDNN is on"
        print(chatter)
        print(chatter, file=sys.stderr)
        print("W" + chatter[1:], file=sys.stderr)
    """
    flag = "--filter_tf_startup" if drop else "--nofilter_tf_startup"
    job = launch(script, "--num_workers=1", flag, "script.py")
    assert job.wait() == 0
    first_letters = sorted(line.removeprefix("[worker 0] ")[0] for line in job.lines)
    assert first_letters == (["I", "W"] if drop else ["I", "I", "W"])


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(3)", 3, "worker 1 failed with exit code 3"),
        ("os.kill(os.getpid(), 9)", 137, "worker 1 was killed by SIGKILL"),
    ],
)
def test_a_failed_task_is_reported_at_once_and_the_others_go_on(
    launch: Launch, tmp_path: Path, end: str, status: int, words: str
) -> None:
    script = f"""
        import os, pathlib, sys, time
        if '"index": 1' in os.environ["TF_CONFIG"]:
            print("last words")
            {end}
        while not pathlib.Path("end").exists():
            time.sleep(0.02)
        print("reached the end")
        sys.exit(4)
    """
    job = launch(script, "--num_workers=2", "script.py")
    job.wait_for(words)
    (tmp_path / "end").touch()
    assert job.wait() == status
    assert job.lines == [
        "[worker 1] last words",
        f"[launcher] {words}",
        "[worker 0] reached the end",
        "[launcher] worker 0 failed with exit code 4",
        f"[launcher] job failed: {words}",
    ]


def test_stop_on_failure_stops_the_others(launch: Launch) -> None:
    script = """
        import os, sys, time
        if '"index": 0' in os.environ["TF_CONFIG"]:
            sys.exit(5)
        time.sleep(600)
    """
    flags = ("--num_workers=3", "--stop_on_failure", "--grace_seconds=40", "script.py")
    job = launch(script, *flags)
    assert job.wait() == 5
    assert job.lines[0] == "[launcher] worker 0 failed with exit code 5"
    assert job.lines[-1] == "[launcher] job failed: worker 0 failed with exit code 5"
    assert len(job.lines) == 3


def test_a_reader_that_goes_away_stops_the_job(launch: Launch) -> None:
    script = """
        import time
        while True:
            print("again")
            time.sleep(0.02)
    """
    reader, writer = os.pipe()
    with open(writer, "wb"):
        job = launch(script, "--num_workers=2", "script.py", stdout=writer)
    with open(reader, "rb") as pipe:
        assert pipe.readline().endswith(b"again\n")
    assert job.wait() == 141
    assert job.lines[-1] == "[launcher] job was stopped by SIGPIPE"
