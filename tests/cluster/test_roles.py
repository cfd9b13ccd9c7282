"""What a process is, and where the others are."""

import json

import pytest

from tf_syncdist.cluster.roles import SINGLE_WORKER, ClusterRole, resolve, role_in
from tf_syncdist.errors import ClusterConfigError, SyncDistError

A, B, C, P, Q = (f"10.0.0.{i}:5000" for i in range(5))
WORKERS = {"worker": [A, B]}


@pytest.mark.parametrize(
    "cluster, task, role",
    [
        (WORKERS, ("worker", 1), ClusterRole("worker", 1, (A, B), ())),
        ({**WORKERS, "ps": [P, Q]}, ("worker", 0), ClusterRole("worker", 0, (A, B), (P, Q))),
        ({**WORKERS, "ps": [P, Q]}, ("ps", 1), ClusterRole("ps", 1, (A, B), (P, Q))),
        ({"chief": [C], **WORKERS}, ("chief", 0), ClusterRole("worker", 0, (C, A, B), ())),
        ({"chief": [C], **WORKERS}, ("worker", 1), ClusterRole("worker", 2, (C, A, B), ())),
        ({"chief": [C], "ps": [P]}, ("chief", 0), ClusterRole("worker", 0, (C,), (P,))),
        ({"worker": [A]}, ("worker", None), ClusterRole("worker", 0, (A,), ())),
        ({**WORKERS, "evaluator": [C]}, ("worker", 0), ClusterRole("worker", 0, (A, B), ())),
        ({}, (None, None), SINGLE_WORKER),
        ({"worker": []}, ("worker", 0), SINGLE_WORKER),
    ],
)
def test_roles(cluster: dict, task: tuple, role: ClusterRole) -> None:
    assert role_in(cluster, *task) == role


def test_what_follows_from_a_role() -> None:
    ps = role_in({"chief": [C], **WORKERS, "ps": [P, Q]}, "ps", 1)
    assert (ps.is_aggregator, ps.num_workers, ps.address) == (True, 3, Q)
    assert ps.service_addresses == (P, Q)
    second = role_in({"chief": [C], **WORKERS}, "worker", 0)
    assert (second.is_aggregator, second.num_workers, second.address) == (False, 3, A)
    # Without a `ps` task the service is with worker 0.
    assert second.service_addresses == (C,)
    assert SINGLE_WORKER.num_workers == 1 and SINGLE_WORKER.service_addresses == ()


@pytest.mark.parametrize(
    "cluster, task, named",
    [
        (WORKERS, ("worker", 2), ["'worker', index 2", "'worker': 2"]),
        (WORKERS, ("worker", -1), ["index -1"]),
        (WORKERS, ("ps", 0), ["'ps', index 0"]),
        (WORKERS, (None, None), ["None", '"task"']),
        (WORKERS, ("chief", 0), ["'chief'"]),
        ({**WORKERS, "evaluator": [C]}, ("evaluator", 0), ["evaluator"]),
        ({"ps": [P]}, ("ps", 0), ["only `ps` tasks"]),
        ({"worker": [], "ps": [P]}, ("ps", 0), ["only `ps` tasks"]),
        ({"master": [A], **WORKERS}, ("worker", 0), ["master"]),
    ],
)
def test_clusters_that_cannot_be_used(cluster: dict, task: tuple, named: list[str]) -> None:
    with pytest.raises(ClusterConfigError) as error:
        role_in(cluster, *task)
    assert all(name in str(error.value) for name in [*named, "Expected", "Received: "])
    assert isinstance(error.value, SyncDistError) and isinstance(error.value, ValueError)


def tf_config(cluster: object, task: object) -> str:
    """Returns the text of a TF_CONFIG."""
    return json.dumps({"cluster": cluster, "task": task})


@pytest.mark.parametrize(
    "text, role",
    [
        (None, SINGLE_WORKER),
        ("", SINGLE_WORKER),
        ("{}", SINGLE_WORKER),
        (json.dumps({"task": {"type": "worker", "index": 0}}), SINGLE_WORKER),
        (tf_config({}, {}), SINGLE_WORKER),
        (
            tf_config({"chief": [C], **WORKERS, "ps": [P]}, {"type": "worker", "index": 1}),
            ClusterRole("worker", 2, (C, A, B), (P,)),
        ),
        (
            tf_config(WORKERS, {"type": "worker", "index": "1"}),
            ClusterRole("worker", 1, (A, B), ()),
        ),
        (
            tf_config(
                {"worker": ["[::1]:5000", "host-a.example:5"]}, {"type": "worker", "index": 0}
            ),
            ClusterRole("worker", 0, ("[::1]:5000", "host-a.example:5"), ()),
        ),
    ],
)
def test_the_role_comes_from_tf_config(
    monkeypatch: pytest.MonkeyPatch, text: str | None, role: ClusterRole
) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    assert resolve() == role


TASK = {"type": "worker", "index": 0}


@pytest.mark.parametrize(
    "text, named",
    [
        ("{", "to be JSON"),
        ("worker 0", "to be JSON"),
        ("[]", "to be an object"),
        ("null", "to be an object"),
        ("3", "to be an object"),
        (tf_config(None, TASK), "to be an object"),
        (tf_config([A, B], TASK), "to be an object"),
        (tf_config({"worker": A}, TASK), "'worker'"),
        (tf_config({"worker": 2}, TASK), "'worker'"),
        (tf_config({"worker": ["10.0.0.1"]}, TASK), "10.0.0.1"),
        (tf_config({"worker": [":5000"]}, TASK), ":5000"),
        (tf_config({"worker": ["host:"]}, TASK), "host:"),
        (tf_config({"worker": ["host:http"]}, TASK), "host:http"),
        (tf_config({"worker": [5000]}, TASK), "5000"),
        (tf_config({"worker": [None]}, TASK), "None"),
        (tf_config({"worker": {"first": A}}, TASK), "first"),
        (tf_config({**WORKERS, "ps": "x"}, TASK), "'ps'"),
        (json.dumps({"cluster": WORKERS}), '"task"'),
        (tf_config(WORKERS, None), '"task"'),
        (tf_config(WORKERS, "worker"), '"task"'),
        (tf_config(WORKERS, {"type": "worker"}), '"task"'),
        (tf_config(WORKERS, {"index": 0}), '"task"'),
        (tf_config(WORKERS, {"type": "worker", "index": -1}), "-1"),
        (tf_config(WORKERS, {"type": "worker", "index": 1.5}), "1.5"),
        (tf_config(WORKERS, {"type": "worker", "index": None}), "None"),
        (tf_config(WORKERS, {"type": "worker", "index": "first"}), "first"),
        (tf_config(WORKERS, {"type": "worker", "index": 2}), "index 2"),
        (tf_config(WORKERS, {"type": "ps", "index": 0}), "'ps'"),
        (tf_config(WORKERS, {"type": None, "index": 0}), "None"),
        (tf_config(WORKERS, {"type": 7, "index": 0}), "7"),
        (tf_config(WORKERS, {"type": ["worker"], "index": 0}), "worker"),
        (tf_config({"ps": [P]}, {"type": "ps", "index": 0}), "only `ps`"),
    ],
)
def test_every_other_tf_config_is_a_config_error_that_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, text: str, named: str
) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ClusterConfigError) as error:
        resolve()
    assert named in str(error.value)
    assert "Expected" in str(error.value) and "Received: " in str(error.value)


def test_tasks_may_be_numbered_in_tf_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's ClusterSpec knows sparse jobs; as JSON their numbers are strings."""
    cluster = {"worker": {"0": A, "1": B}}
    monkeypatch.setenv("TF_CONFIG", tf_config(cluster, {"type": "worker", "index": 1}))
    assert resolve() == ClusterRole("worker", 1, (A, B), ())


def test_any_resolver_of_tensorflow_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setenv("TF_CONFIG", "not even JSON")
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"chief": [C], **WORKERS}), task_type="worker", task_id=1
    )
    assert resolve(resolver) == ClusterRole("worker", 2, (C, A, B), ())
    empty = tf.distribute.cluster_resolver.SimpleClusterResolver(tf.train.ClusterSpec({}))
    assert resolve(empty) == SINGLE_WORKER
