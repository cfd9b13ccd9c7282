"""What the programs of this directory share that put the same questions to two strategies.

An answer is what a question returns, as nested lists of numbers and texts, or the error.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import tf_syncdist

Strategy = tf.distribute.Strategy
Question = Callable[[Strategy], Any]

ARGUMENTS = json.loads(sys.argv[1])

_questions: dict[str, Question] = {}


def question(ask: Question) -> Question:
    """Adds a question under the name of the function."""
    return add(ask.__name__, ask)


def add(name: str, ask: Question) -> Question:
    """Adds a question."""
    _questions[name] = ask
    return ask


def replica_id() -> tf.Tensor:
    """Returns the id of the replica that asks."""
    return tf.convert_to_tensor(tf.distribute.get_replica_context().replica_id_in_sync_group)


def matrix() -> tf.Tensor:
    """Returns another matrix of floats on each replica."""
    offset = tf.cast(replica_id() * 10, tf.float32)
    return offset + tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def local_results(strategy: Strategy, value: Any) -> Any:
    """Returns the local results of all values of a nest."""
    return tf.nest.map_structure(strategy.experimental_local_results, value)


def numbered_values(strategy: Strategy) -> tuple[Any, list[int], list[int]]:
    """Returns distributed values, and the ids and numbers of replicas that their maker was told."""
    ids, counts = [], []

    def value(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        ids.append(context.replica_id_in_sync_group)
        counts.append(context.num_replicas_in_sync)
        return tf.constant([float(context.replica_id_in_sync_group)])

    return strategy.experimental_distribute_values_from_function(value), ids, counts


def write_answers() -> None:
    """Puts all questions to MirroredStrategy and to one worker of ours, and writes the answers."""
    devices = ARGUMENTS["devices"]
    cpu = tf.config.list_physical_devices("CPU")[0]
    configuration = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [configuration] * devices)
    # Collectives of strategies in one process have the same keys, and fail if their shapes differ.
    tf_syncdist.SyncReplicasStrategy._collective_key_base = 100_000
    mirrored = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])
    ours = tf_syncdist.SyncReplicasStrategy()
    results = {
        name: {"mirrored": _answer(name, mirrored), "ours": _answer(name, ours)}
        for name in _questions
    }
    Path(ARGUMENTS["results"]).write_text(json.dumps(results))


def _answer(name: str, strategy: Strategy) -> dict[str, Any]:
    print(name, flush=True)
    try:
        return {"answer": _plain(_questions[name](strategy))}
    except Exception as e:  # noqa: BLE001 - to be compared
        return {"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}


def _plain(value: Any) -> Any:
    """Turns an answer into what JSON knows."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, tf.distribute.DistributedValues):
        return {type(value).__name__: _plain(value.values)}
    if tf.is_tensor(value) or isinstance(value, np.ndarray | np.generic):
        return [value.dtype.name, np.asarray(value).tolist()]
    if isinstance(value, bytes):
        return value.decode()
    return value
