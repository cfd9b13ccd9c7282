"""One worker of benchmarks.allreduce under a tf.distribute strategy: ours or TensorFlow's own."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import tensorflow as tf
from absl import flags

from benchmarks import allreduce_child as child

_SYSTEM = flags.DEFINE_enum("system", "ours", ["ours", "mwms"], "Strategy under test.")
_TRANSPORT = flags.DEFINE_string("transport", "grpc", "How values travel, for ours.")

# Float32 sums in another order differ by rounding only.
_TOLERANCE = 1e-4
_MAX_LOCAL_ROUNDS = 50

Step = Callable[[list[tf.Tensor]], tf.Tensor]


def _make_strategy() -> tf.distribute.Strategy:
    """Returns the strategy under test, with its place in the cluster taken from TF_CONFIG."""
    if _SYSTEM.value == "mwms":
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=_ring())
    # Not at the top: the peer has to run where tf_syncdist cannot be imported.
    import tf_syncdist

    return tf_syncdist.SyncReplicasStrategy(print_report=False, transport=_TRANSPORT.value)


def _ring() -> tf.distribute.experimental.CommunicationOptions:
    """Returns the options of the peer."""
    return tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.RING
    )


def _make_step(
    strategy: tf.distribute.Strategy | None, tensors: list[tf.Tensor], options: object
) -> Step:
    """Returns a step that exchanges tensors and uses all results.

    Args:
        strategy: None for a step that does the same without an exchange.
        tensors: Tensors like those that will be exchanged.
        options: The options of all_reduce.
    """

    def replica_step(values: list[tf.Tensor]) -> tf.Tensor:
        if strategy is not None:
            context = tf.distribute.get_replica_context()
            # The peer needs to know on which device they are; this copies nothing.
            values = [tf.identity(value) for value in values]
            values = context.all_reduce(tf.distribute.ReduceOp.SUM, values, options)
        # One value of each tensor is enough to keep all of them from being pruned.
        return tf.add_n([tf.reshape(value, [-1])[-1] for value in values])

    @tf.function(input_signature=[[tf.TensorSpec(t.shape, t.dtype) for t in tensors]])
    def step(values: list[tf.Tensor]) -> tf.Tensor:
        return replica_step(values) if strategy is None else strategy.run(replica_step, (values,))

    return step


def _measure() -> child.Result:
    """Exchanges tensors and returns the seconds of each step, and of one without an exchange.

    The tensors of a step are made and the workers wait for each other before its time begins.
    """
    try:
        strategy = _make_strategy()
    except ImportError as error:
        return child.missing(error)
    task = child.task()
    sources = [
        tf.random.stateless_uniform(shape, (0, seed), 0.5, 1.5)
        for seed, shape in enumerate(child.shapes())
    ]
    last_values = sum(float(tf.reshape(source, [-1])[-1]) for source in sources)
    factors = task.num_workers * (task.num_workers + 1) / 2
    options = _ring() if _SYSTEM.value == "mwms" else None
    step = _make_step(strategy, sources, options)
    meet = _make_step(strategy, [tf.constant([1.0])], options)
    made: list[tf.Tensor] = []

    def prepare(number: int) -> None:
        made[:] = [source * (_scale(number) * (task.index + 1)) for source in sources]
        float(meet([tf.constant([1.0])]))

    def exchange(number: int) -> float:
        return float(step(made))

    def check(number: int, found: float) -> None:
        expected = last_values * factors * _scale(number)
        if not math.isclose(found, expected, rel_tol=_TOLERANCE):
            raise RuntimeError(
                f"Expected the last values of all tensors to sum up to {expected} in exchange "
                f"{number}, got {found}; the time of a wrong result means nothing, so look for "
                "the error first."
            )

    result = child.time_rounds(exchange, before=prepare, after=check)
    return {**result, "local_seconds": _time_locally(_make_step(None, sources, None), sources)}


def _scale(number: int) -> float:
    """Returns a factor that makes an exchange differ from the one before."""
    return 1.0 + number % 8


def _time_locally(step: Step, sources: list[tf.Tensor]) -> float:
    """Returns the median seconds of a step that exchanges nothing."""
    seconds = []
    for _ in range(1 + min(_MAX_LOCAL_ROUNDS, child.ROUNDS.value)):
        begin = time.perf_counter()
        float(step(sources))
        seconds.append(time.perf_counter() - begin)
    # The first one is traced.
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    child.run(_measure)
