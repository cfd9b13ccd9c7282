"""Makes mistakes one after the other, as worker 0 of two where nobody else has been started."""

import json
import os
import socket
import time
from collections.abc import Callable

import keras
import numpy as np
import task
import tensorflow as tf

import tf_syncdist

ADDRESSES = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
SyncReplicas = tf_syncdist.SyncReplicasStrategy

results: dict[str, dict] = {}


def record(name: str, mistake: Callable[[], object]) -> None:
    started_at = time.monotonic()
    try:
        mistake()
    except Exception as e:  # noqa: BLE001 - which one it is, is what the test looks at
        kinds = [kind.__name__ for kind in type(e).__mro__]
        results[name] = {"kinds": kinds, "message": str(e)}
    else:
        results[name] = {"kinds": [], "message": "there was no error"}
    results[name]["seconds"] = time.monotonic() - started_at


def in_cluster(text: str, **arguments: object) -> Callable[[], object]:
    """Returns a call of the strategy with another TF_CONFIG."""

    def make() -> object:
        before = os.environ["TF_CONFIG"]
        os.environ["TF_CONFIG"] = text
        try:
            return SyncReplicas(**arguments)
        finally:
            os.environ["TF_CONFIG"] = before

    return make


def config(workers: list[str], task_type: str, index: int, **other_jobs: list[str]) -> str:
    cluster = {"worker": workers, **other_jobs}
    return json.dumps({"cluster": cluster, "task": {"type": task_type, "index": index}})


def before_anything_is_connected() -> None:
    record("backup_workers_2_of_2", lambda: SyncReplicas(backup_workers=2))
    record("backup_workers_3_of_2", lambda: SyncReplicas(backup_workers=3))
    record("backup_workers_negative", lambda: SyncReplicas(backup_workers=-1))
    both = {"backup_workers": 1, "cutoff": tf_syncdist.cutoff.FullSync()}
    record("backup_workers_and_cutoff", lambda: SyncReplicas(**both))
    record("cutoff_unknown", lambda: SyncReplicas(cutoff="elfving"))
    in_order = {"deterministic": True, "cutoff": tf_syncdist.cutoff.Deadline(1.0)}
    record("cutoff_in_order", lambda: SyncReplicas(**in_order))
    record("trace_nowhere", lambda: SyncReplicas(record_trace="nowhere/trace.npz"))
    learned = tf_syncdist.cutoff.LearnedCutoff("nowhere.npz")
    record("model_nowhere", lambda: SyncReplicas(cutoff=learned))
    record("no_json", in_cluster("{cluster: worker}"))
    record("index_not_in_cluster", in_cluster(config(ADDRESSES, "worker", 2)))
    record("job_not_in_cluster", in_cluster(config(ADDRESSES, "ps", 0)))
    beyond = [f"192.0.2.1:{ADDRESSES[0].rpartition(':')[2]}", ADDRESSES[1]]
    record("beyond_loopback", in_cluster(config(beyond, "worker", 0)))
    record("ps_beyond_loopback", in_cluster(config(ADDRESSES, "ps", 0, ps=beyond[:1])))
    host, _, port = ADDRESSES[0].rpartition(":")
    with socket.create_server((host, int(port))):
        record("port_in_use", SyncReplicas)
    nobody = config(ADDRESSES[::-1], "worker", 1)
    record("unreachable", in_cluster(nobody, connect_timeout_seconds=3.0))


def while_training() -> None:
    strategy = SyncReplicas(**task.PATIENCE)
    x, y = np.zeros((99, 4), "float32"), np.zeros((99, 1), "float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(33)
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=True)
    record("jit_compile", lambda: model.fit(x, y, batch_size=32, verbose=0))
    with strategy.scope():
        model.compile("sgd", "mse")
    record("batch_of_arrays", lambda: model.fit(x, y, batch_size=33, verbose=0))
    record("batch_of_dataset", lambda: model.fit(dataset, verbose=0))
    record("batch_of_loop", lambda: strategy.experimental_distribute_dataset(dataset))


before_anything_is_connected()
while_training()
task.write(0, results)
# What a user sees of it: a traceback, and the end of the process.
in_cluster(config(ADDRESSES[::-1], "worker", 1), connect_timeout_seconds=1.0)()
