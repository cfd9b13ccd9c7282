"""Asks about what lives longer than a value: datasets, variables and merge calls."""

from typing import Any

import tensorflow as tf
from answers import Strategy, local_results, matrix, numbered_values, question, write_answers


@question
def datasets(strategy: Strategy) -> Any:
    dataset = tf.data.Dataset.range(10).batch(4)
    contexts: list[tf.distribute.InputContext] = []

    def make(context: tf.distribute.InputContext) -> tf.data.Dataset:
        contexts.append(context)
        return dataset

    found = [
        [strategy.experimental_local_results(batch) for batch in distributed]
        for distributed in (
            strategy.experimental_distribute_dataset(dataset),
            strategy.distribute_datasets_from_function(make),
        )
    ]
    names = ("num_input_pipelines", "input_pipeline_id", "num_replicas_in_sync")
    return [found, [[getattr(c, name) for name in names] for c in contexts]]


@question
def variables(strategy: Strategy) -> Any:
    with strategy.scope():
        mirrored = tf.Variable([1.0, 2.0], aggregation=tf.VariableAggregation.MEAN)
        on_read = tf.Variable(
            0.0,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    @tf.function
    def step() -> Any:
        def replica() -> tf.Tensor:
            mirrored.assign_add(matrix()[0, :2])
            on_read.assign_add(tf.reduce_sum(matrix()))
            return on_read.read_value()

        return strategy.run(replica)

    read = strategy.experimental_local_results(step())
    values = [v.numpy() for v in strategy.experimental_local_results(mirrored)]
    return [read, values, mirrored.numpy(), on_read.numpy(), strategy.reduce("SUM", on_read, None)]


@question
def merge_call(strategy: Strategy) -> Any:
    def merge(inner: Strategy, value: Any) -> Any:
        assert inner is strategy and tf.distribute.in_cross_replica_context()
        return inner.reduce("SUM", value, axis=None)

    def replica() -> tf.Tensor:
        return tf.distribute.get_replica_context().merge_call(merge, args=(matrix(),))

    return local_results(strategy, tf.function(lambda: strategy.run(replica))())


@question
def merge_call_that_returns_distributed_values(strategy: Strategy) -> Any:
    values, _, _ = numbered_values(strategy)

    def replica() -> tf.Tensor:
        return tf.distribute.get_replica_context().merge_call(lambda _: values) + 1

    return local_results(strategy, strategy.run(replica))


@question
def a_function_as_replica_function(strategy: Strategy) -> Any:
    return local_results(strategy, strategy.run(tf.function(lambda x: x + matrix()), args=(1.0,)))


write_answers()
