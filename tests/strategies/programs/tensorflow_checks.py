"""Runs checks of TensorFlow's own test bases for MirroredStrategy and for ours.

Writes what became of every check in every mode, by the name of the strategy.
"""

import contextlib
import itertools
import json
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import strategy_test_lib as bases
from tensorflow.python.eager import context

import tf_syncdist

ARGUMENTS = json.loads(sys.argv[1])
DEVICES = ARGUMENTS["devices"]

# Collectives of strategies in one process have the same keys, and fail if their shapes differ.
_keys = itertools.count(1)


def _mirrored() -> tf.distribute.Strategy:
    tf.distribute.MirroredStrategy._collective_key_base = next(_keys) * 100_000
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(DEVICES)])


def _ours() -> tf.distribute.Strategy:
    tf_syncdist.SyncReplicasStrategy._collective_key_base = next(_keys) * 100_000
    return tf_syncdist.SyncReplicasStrategy()


_STRATEGIES = {"mirrored": _mirrored, "ours": _ours}
_BASE = bases.OneDeviceDistributionTestBase if DEVICES == 1 else bases.TwoDeviceDistributionTestBase


class Checks(bases.DistributionTestBase, _BASE):
    """TensorFlow's checks, and those of its input checks that need data with data.

    Args:
        name: Name of the check, without "_test_".
        mode: "eager", "function" (what a replica does is a tf.function) or "graph".
        strategy: Makes the strategy.
    """

    def __init__(self, name: str, mode: str, strategy: Callable[[], tf.distribute.Strategy]):
        super().__init__("run_check")
        self._check = getattr(self, f"_test_{name}")
        self._mode = mode
        self._strategy = strategy

    def run_check(self) -> None:
        """Runs the check; raises an error if it fails."""
        # A session of TensorFlow 1 knows one CPU device, unless it is told otherwise.
        kwargs = {"soft_placement": True} if self._check == self._test_minimize_loss_graph else {}
        if self._mode == "function":
            kwargs["run_in_function"] = True
        with contextlib.ExitStack() as stack:
            if self._mode == "graph":
                stack.enter_context(context.graph_mode())
                stack.enter_context(tf.Graph().as_default())
                stack.enter_context(self.test_session())
            self._check(self._strategy(), **kwargs)

    def _test_datasets_from_function(self, strategy: tf.distribute.Strategy) -> None:
        expected = [list(range(i, i + DEVICES)) for i in range(0, 10, DEVICES)]
        self._test_input_fn_iterable(strategy, self._input_fn(), expected)

    def _test_iterator_from_function(self, strategy: tf.distribute.Strategy) -> None:
        expected = [list(range(i, i + DEVICES)) for i in range(0, 10, DEVICES)]
        iterator = strategy.make_input_fn_iterator(self._input_fn())
        self._test_input_fn_iterator(iterator, strategy.extended.worker_devices, expected)

    def _input_fn(self) -> Callable:
        return self._input_fn_to_test_input_context(
            lambda: tf.data.Dataset.range(10),
            expected_num_replicas_in_sync=DEVICES,
            expected_num_input_pipelines=1,
            expected_input_pipeline_id=0,
        )


def _outcome(case: unittest.TestCase) -> dict[str, str]:
    result = unittest.TestResult()
    case.run(result)
    if result.skipped:
        return {"outcome": "skipped", "text": result.skipped[0][1]}
    problems = [*result.failures, *result.errors]
    if problems:
        return {"outcome": "failed", "text": problems[0][1]}
    return {"outcome": "passed", "text": ""}


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
    )
    results: dict[str, Any] = {}
    for name, mode in ARGUMENTS["checks"]:
        for strategy, make in _STRATEGIES.items():
            print(f"{name}, {mode}, {strategy}", flush=True)
            results.setdefault(f"{name}-{mode}", {})[strategy] = _outcome(Checks(name, mode, make))
    Path(ARGUMENTS["results"]).write_text(json.dumps(results))


main()
