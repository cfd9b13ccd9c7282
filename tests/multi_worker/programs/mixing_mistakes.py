"""Worker 1 makes mistakes with strategies in which nobody waits; worker 0 does well."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist
from tf_syncdist.transport.credentials import Credentials
from tf_syncdist.transport.models import ModelFormat
from tf_syncdist.transport.partners import Partners

DIRECTORY = Path(task.ARGUMENTS["directory"])
KIND: str = task.ARGUMENTS["kind"]
me = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
TOKEN = {"token": "a-secret-of-the-test"}
PATIENCE = {"connect_timeout_seconds": 60.0, "timeout_seconds": 90.0}
Elastic = tf_syncdist.ElasticAveragingStrategy
Gossip = tf_syncdist.GossipStrategy
Async = tf_syncdist.AsyncStrategy

results: dict[str, dict[str, Any]] = {}


def record(name: str, mistake: Callable[[], object]) -> None:
    started_at = time.monotonic()
    try:
        mistake()
    except Exception as e:  # noqa: BLE001 - which one it is, is what the test looks at
        results[name] = {"kind": type(e).__name__, "message": str(e)}
    else:
        results[name] = {"kind": "", "message": "there was no error"}
    results[name]["seconds"] = time.monotonic() - started_at


def wait_for(name: str) -> None:
    deadline = time.monotonic() + 100
    while not (DIRECTORY / name).exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.02)


def before_anything_is_connected() -> None:
    record("period_0", lambda: Elastic(period=0))
    record("period_half", lambda: Gossip(period=1.5))
    record("moving_rate_0", lambda: Elastic(moving_rate=0.0))
    record("moving_rate_1", lambda: Elastic(moving_rate=1.0))
    record("moving_rate_text", lambda: Elastic(moving_rate="fast"))
    record("mode", lambda: Gossip(mode="pool"))
    record("partners_without_itself", lambda: Gossip(partners=[0]))
    record("partners_out_of_range", lambda: Gossip(partners=[1, 2]))
    record("partners_negative", lambda: Gossip(partners=[1, -1]))
    record("partners_none", lambda: Gossip(partners=[]))
    record("partners_text", lambda: Gossip(partners="ring"))
    record("partners_number", lambda: Gossip(partners=1))
    record("partner_timeout", lambda: Gossip(partner_timeout_seconds=0))
    record("staleness_negative", lambda: Async(max_staleness=-1))
    record("staleness_half", lambda: Async(max_staleness=1.5))


def other_than_worker_0() -> None:
    if KIND == "elastic":
        record("other_rate", lambda: Elastic(0.3, 2, **PATIENCE))
        record("other_period", lambda: Elastic(0.2, 3, **PATIENCE))
        record("async", lambda: Async(**PATIENCE))
        record("gossip", lambda: Gossip(**PATIENCE))
        record("sync_replicas", lambda: tf_syncdist.SyncReplicasStrategy(**PATIENCE))
    else:
        record("push", lambda: Gossip("push", **TOKEN, **PATIENCE))
        record("other_period", lambda: Gossip(period=2, **TOKEN, **PATIENCE))
        record("other_token", lambda: Gossip(token="wrong", **PATIENCE))
        record("averaging", lambda: tf_syncdist.ModelAveragingStrategy(**TOKEN, **PATIENCE))


def small(strategy: Any, **options: Any) -> keras.Model:
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", **options)
    return model


def stranger(strategy: Any) -> dict[str, Any]:
    """Asks worker 0 for its model with a wrong token, and with the right one."""
    live, _ = strategy._member.session.served_at
    seed = strategy._member.session.job_seed
    models = ModelFormat([("kernel", "float32", (4, 1))], seed, 1)
    found = {}
    for token in ("wrong", TOKEN["token"]):
        notices: list[str] = []
        credentials = Credentials(token=token)
        with Partners(1, seed, 30.0, credentials, notices.append) as partners:
            partners.update({0: live[0]})
            found["wrong" if token == "wrong" else "right"] = {
                "greeted": partners.greet(0) is not None,
                "pulled": partners.pull(0, models) is not None,
                "notices": notices,
            }
    return found


def to_and_fro(strategy: Any) -> None:
    models = [small(strategy), small(strategy)]

    @tf.function
    def step(number: int) -> None:
        def replica_step() -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(models[number](tf.ones((2, 4))) ** 2)
            variables = models[number].trainable_variables
            gradients = tape.gradient(loss, variables)
            models[number].optimizer.apply_gradients(zip(gradients, variables, strict=True))

        strategy.run(replica_step)

    for number in (0, 1, 0):
        step(number)


def compiled_loop(strategy: Any) -> None:
    model = small(strategy)

    @tf.function(jit_compile=True)
    def step() -> None:
        def replica_step() -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(tf.ones((2, 4))) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        strategy.run(replica_step)

    step()


def main() -> None:
    if me == 1:
        before_anything_is_connected()
        wait_for("worker-0-is-there")
        other_than_worker_0()
    if KIND == "elastic":
        strategy = Elastic(0.2, 2, **PATIENCE)
    else:
        strategy = Gossip(**TOKEN, **PATIENCE)
    (DIRECTORY / f"worker-{me}-is-there").touch()
    x = np.random.RandomState(1).randn(64, 4).astype("float32")
    model = small(strategy)
    model.fit(x, x[:, :1], batch_size=4, epochs=5, verbose=0)
    task.meet(strategy, "trained")
    if me == 1:
        compiled = small(strategy, jit_compile=True)
        record("jit_compile", lambda: compiled.fit(x, x[:, :1], verbose=0))
        record("jit_compile_in_loop", lambda: compiled_loop(strategy))
        if KIND == "gossip":
            results["stranger"] = stranger(strategy)
        record("to_and_fro", lambda: to_and_fro(strategy))
    results["mixed"] = {"own": strategy.report().own.mixed}
    task.meet(strategy, "end")
    task.write(me, results)


main()
