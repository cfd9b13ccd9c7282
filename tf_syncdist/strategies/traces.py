"""What a traced function does to variables, read from its graph.

A worker that comes too late for a round applies the round's result through the optimizers and
skips the rest of the training function. That is right only if nothing else of lasting effect is
skipped: whatever the function writes besides has to be written by the replay too.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

# What is summed as what.
SUM_DTYPES = {
    tf.float16: tf.float32,
    tf.bfloat16: tf.float32,
    tf.float32: tf.float32,
    tf.float64: tf.float64,
    tf.int32: tf.int32,
    tf.int64: tf.int64,
}


def widened(result: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns the result of an exchange as values of the dtype that was given to it.

    Narrow values are widened before anything is computed with them.
    """
    return tf.cast(tf.cast(result, SUM_DTYPES[dtype]), dtype)


# Operations that are given a variable and leave it as it is.
_READS = {
    "DisableCopyOnRead",
    "ReadVariableOp",
    "ResourceGather",
    "ResourceGatherNd",
    "VarIsInitializedOp",
    "VariableShape",
    "_ReadVariablesOp",
}

# Operations that call functions with the rest of their inputs as arguments.
_CALLS = {
    "Case",
    "If",
    "PartitionedCall",
    "StatefulPartitionedCall",
    "StatelessCase",
    "StatelessIf",
    "StatelessWhile",
    "While",
}

# Inside of a run, exchanges carry this name.
EXCHANGE_NAME = "tf_syncdist_exchange"


def count_writes(function: Any) -> Counter[int]:
    """Returns how many operations of a concrete function write each variable, by its identity.

    Args:
        function: A `tf.types.experimental.ConcreteFunction`.
    """
    graph_def = function.graph.as_graph_def()
    library = {f.signature.name: f for f in graph_def.library.function}
    inside: dict[str, Counter[str]] = {}
    by_name = _count(graph_def.node, library, inside)
    variables = {id(v.handle): v for v in function.graph.variables}
    captured = function.inputs[len(function.inputs) - len(function.captured_inputs) :]
    found: Counter[int] = Counter()
    for outer, placeholder in zip(function.captured_inputs, captured, strict=True):
        if id(outer) in variables and by_name[placeholder.op.name]:
            found[id(variables[id(outer)])] = by_name[placeholder.op.name]
    return found


def has_exchange(function: Any) -> bool:
    """Returns whether a concrete function, or one that it calls, contains an exchange."""
    graph_def = function.graph.as_graph_def()
    bodies = [graph_def.node, *(f.node_def for f in graph_def.library.function)]
    return any(EXCHANGE_NAME in node.name for nodes in bodies for node in nodes)


def nesting(root: Any) -> tuple[str, ...]:
    """Returns the kinds of graphs from the current one outwards to `root`, without it."""
    kinds = []
    graph = tf.compat.v1.get_default_graph()
    while graph is not root and graph is not None:
        kinds.append(type(graph).__name__)
        graph = getattr(graph, "outer_graph", None)
    return tuple(kinds)


def _count(
    nodes: Iterable[Any], library: dict[str, Any], inside: dict[str, Counter[str]]
) -> Counter[str]:
    """Returns how many operations write what each name stands for, called functions included."""
    found: Counter[str] = Counter()
    for node in nodes:
        if node.op in _READS:
            continue
        data = [i.split(":")[0] for i in node.input if not i.startswith("^")]
        called = _called(node) if node.op in _CALLS else []
        for name in called:
            function = library[name]
            if name not in inside:
                inside[name] = _count(function.node_def, library, inside)
            arguments = [a.name for a in function.signature.input_arg]
            # A condition's first input chooses the branch.
            for given, argument in zip(data[len(data) - len(arguments) :], arguments, strict=True):
                found[given] += inside[name][argument]
        if not called:
            for name in set(data):
                found[name] += 1
    return found


def _called(node: Any) -> list[str]:
    names = []
    for key, value in node.attr.items():
        # Attributes that begin with an underscore only describe.
        if not key.startswith("_"):
            names += [value.func.name] if value.HasField("func") else []
            names += [f.name for f in value.list.func] if value.HasField("list") else []
    return names


def last_call() -> tf.Operation | None:
    """Returns the operation by which a concrete function was just called in the current graph.

    A control dependency on it waits for everything that the function does, while one on its
    outputs waits for these only.
    """
    for op in reversed(tf.compat.v1.get_default_graph().get_operations()):
        if op.type in ("StatefulPartitionedCall", "PartitionedCall"):
            return op
    return None
