"""Asks about values: what replicas are told and return, and how it is reduced and gathered."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from answers import (
    Question,
    Strategy,
    add,
    local_results,
    matrix,
    numbered_values,
    question,
    replica_id,
    write_answers,
)


def _nest() -> dict[str, Any]:
    return {"a": matrix(), "b": [matrix() * 2, (matrix()[0],)]}


@question
def ids_of_replicas(strategy: Strategy) -> Any:
    return local_results(strategy, strategy.run(replica_id))


@question
def ids_of_replicas_in_a_function(strategy: Strategy) -> Any:
    return local_results(strategy, tf.function(lambda: strategy.run(replica_id))())


@question
def ids_by_all_names(strategy: Strategy) -> Any:
    def ids() -> tuple:
        context = tf.distribute.get_replica_context()
        return (
            tf.convert_to_tensor(context.replica_id_in_sync_group),
            tf.constant(context.num_replicas_in_sync),
        )

    return local_results(strategy, strategy.run(ids))


@question
def devices_of_replicas(strategy: Strategy) -> Any:
    def devices() -> str:
        # MirroredStrategy nests them deeper than tf.distribute says, others do not.
        return tf.nest.flatten(tf.distribute.get_replica_context().devices)[0]

    return strategy.experimental_local_results(strategy.run(devices))


@question
def sizes(strategy: Strategy) -> Any:
    extended = strategy.extended
    return [
        strategy.num_replicas_in_sync,
        list(extended.worker_devices),
        list(extended.parameter_devices),
        strategy.cluster_resolver,
        extended.should_checkpoint,
        extended.should_save_summary,
        extended.experimental_between_graph,
        extended.experimental_require_static_shapes,
    ]


@question
def contexts(strategy: Strategy) -> Any:
    inside: list[Any] = []

    def replica() -> int:
        inside.append(tf.distribute.in_cross_replica_context())
        return 0

    with strategy.scope():
        inside.append(tf.distribute.get_strategy() is strategy)
        inside.append(tf.distribute.in_cross_replica_context())
        inside.append(tf.distribute.get_replica_context() is None)
    strategy.run(replica)
    return [inside, tf.distribute.has_strategy()]


@question
def results_of_replicas(strategy: Strategy) -> Any:
    per_replica = strategy.run(_nest)
    return [
        local_results(strategy, per_replica),
        type(strategy.experimental_local_results(per_replica["a"])).__name__,
        strategy.experimental_local_results(tf.constant(3.0)),
        strategy.experimental_local_results(5),
    ]


@question
def what_run_gives_back(strategy: Strategy) -> Any:
    results = [
        strategy.run(lambda: None),
        strategy.run(lambda: "text"),
        strategy.run(lambda: (1, [2.0, {"a": None}])),
        strategy.run(lambda x, y: x + y, args=(1,), kwargs={"y": 2}),
    ]
    return tf.nest.map_structure(strategy.experimental_local_results, results)


@question
def what_a_function_gives_back(strategy: Strategy) -> Any:
    @tf.function
    def step(x: tf.Tensor) -> tuple:
        return strategy.run(lambda y: (y + 1, {"a": None, "b": [y * 2]}), args=(x,)), x

    return tf.nest.map_structure(strategy.experimental_local_results, step(tf.constant([1.0, 2.0])))


@question
def values_from_a_function(strategy: Strategy) -> Any:
    values, seen, counts = numbered_values(strategy)
    return [strategy.experimental_local_results(values), seen, counts]


@question
def values_from_a_function_in_a_run(strategy: Strategy) -> Any:
    values, _, _ = numbered_values(strategy)
    return local_results(strategy, strategy.run(lambda v: v + 1, args=(values,)))


@question
def numbers_that_are_not_distributed(strategy: Strategy) -> Any:
    values = (1.5, 2, tf.constant([1.0, 3.0]))
    return [strategy.reduce(how, v, axis=None) for v in values for how in ("SUM", "MEAN")]


@question
def reduced_by_enum(strategy: Strategy) -> Any:
    return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(matrix), axis=None)


@question
def batches_of_unequal_size(strategy: Strategy) -> Any:
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.range(1.0, 3.0 + 2 * context.replica_id_in_sync_group)
    )
    reduced = [strategy.reduce(how, values, axis=0) for how in ("SUM", "MEAN")]
    return [*reduced, strategy.gather(values, axis=0)]


def _reduce(how: str, axis: int | None, value: Callable[[], Any], in_function: bool) -> Question:
    def ask(strategy: Strategy) -> Any:
        def reduced() -> Any:
            return strategy.reduce(how, strategy.run(value), axis=axis)

        return tf.function(reduced)() if in_function else reduced()

    return ask


def _gather(axis: int, in_function: bool) -> Question:
    def ask(strategy: Strategy) -> Any:
        def gathered() -> Any:
            return strategy.gather(strategy.run(matrix), axis=axis)

        return tf.function(gathered)() if in_function else gathered()

    return ask


def _in_replica(call: Callable[[Any, tf.Tensor], tf.Tensor]) -> Question:
    def ask(strategy: Strategy) -> Any:
        @tf.function
        def step() -> Any:
            return strategy.run(lambda: call(tf.distribute.get_replica_context(), matrix()))

        return local_results(strategy, step())

    return ask


for suffix, in_function in (("", False), ("_in_a_function", True)):
    for how in ("SUM", "MEAN"):
        for axis in (None, 0, 1):
            add(f"reduce_{how}_{axis}{suffix}", _reduce(how, axis, matrix, in_function))
        add(f"reduce_{how}_of_a_nest{suffix}", _reduce(how, None, _nest, in_function))
    for axis in (0, 1):
        add(f"gather_{axis}{suffix}", _gather(axis, in_function))
for axis in (0, 1):
    add(f"all_gather_{axis}", _in_replica(lambda c, v, axis=axis: c.all_gather(v, axis)))
for how in ("SUM", "MEAN"):
    add(f"all_reduce_{how}", _in_replica(lambda c, v, how=how: c.all_reduce(how, v)))


write_answers()
