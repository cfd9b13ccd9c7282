"""Reserving ports, and what the tasks are told about them."""

import json
import os
import socket
from pathlib import Path

import pytest

from tf_syncdist.cluster import environment, ports


def test_reserved_ports_are_distinct_and_below_those_of_outgoing_connections() -> None:
    with ports.reserve_ports(20) as some, ports.reserve_ports(20) as others:
        numbers = [port.port for port in some + others]
    assert len(set(numbers)) == 40
    assert all(20_000 <= number < 30_000 for number in numbers)


def test_a_released_port_can_be_bound_by_a_task_but_not_reserved_again() -> None:
    with ports.reserve_ports(1) as (port,):
        with pytest.raises(OSError), socket.create_server(("127.0.0.1", port.port)):
            pass
        port.release()
        with pytest.raises(OSError):
            ports.ReservedPort(port.port)
        with socket.create_server(("127.0.0.1", port.port)):
            pass


def test_a_port_on_which_someone_listens_is_not_reserved() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError):
        ports.ReservedPort(server.getsockname()[1])


def test_too_few_ports_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_candidates", lambda: range(20_000, 20_001))
    with pytest.raises(OSError, match="Expected 2 free ports"), ports.reserve_ports(2):
        pass


def test_tf_config() -> None:
    assert json.loads(environment.tf_config("worker", 1, [1, 2], [])) == {
        "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
        "task": {"type": "worker", "index": 1},
    }
    assert json.loads(environment.tf_config("ps", 0, [1], [2])) == {
        "cluster": {"worker": ["127.0.0.1:1"], "ps": ["127.0.0.1:2"]},
        "task": {"type": "ps", "index": 0},
    }


PACKAGE = Path(environment.__file__).parents[1]


def test_a_package_that_is_not_installed_is_added_behind_the_users_paths() -> None:
    env, warning = environment.shared_environment({"PYTHONPATH": "mine"}, found="")
    assert env["PYTHONPATH"].split(os.pathsep) == ["mine", str(PACKAGE.parent)]
    assert warning is None
    env, _ = environment.shared_environment({}, found="")
    assert env["PYTHONPATH"] == str(PACKAGE.parent)


def test_an_installed_package_leaves_the_path_alone() -> None:
    env, warning = environment.shared_environment({}, found=str(PACKAGE / "__init__.py"))
    assert "PYTHONPATH" not in env
    assert warning is None


def test_another_copy_of_the_package_is_warned_about() -> None:
    env, warning = environment.shared_environment({}, found="/elsewhere/tf_syncdist/__init__.py")
    assert "PYTHONPATH" not in env
    assert warning is not None and "/elsewhere/tf_syncdist" in warning


def test_a_log_level_that_the_user_has_set_is_kept() -> None:
    assert environment.shared_environment({}, found="")[0]["TF_CPP_MIN_LOG_LEVEL"] == "2"
    env, _ = environment.shared_environment({"TF_CPP_MIN_LOG_LEVEL": "0"}, found="")
    assert env["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert env["PYTHONUNBUFFERED"] == "1"
