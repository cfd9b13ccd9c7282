"""What an exchange of models costs a network: seconds from bytes and bandwidth.

References:
    Jin, Yuan, Iandola, Keutzer: How to scale distributed deep learning?, arXiv 1611.04581.
"""

import math
from typing import NamedTuple


class Network(NamedTuple):
    """A network in which every machine has a line of its own.

    Args:
        bytes_per_second: How much a line carries.
        latency_seconds: How long a message is on its way, whatever its size.
    """

    bytes_per_second: float
    latency_seconds: float = 0.0


def all_reduce_seconds(model_bytes: float, workers: int, network: Network) -> float:
    """Returns how long it takes to average over all workers, once all have computed."""
    passed = 2.0 * model_bytes * (workers - 1) / workers
    return passed / network.bytes_per_second + network.latency_seconds * math.log2(workers)


def centre_seconds(model_bytes: float, network: Network) -> float:
    """Returns how long an exchange with a centre keeps its line busy: a model in and one out."""
    return 2.0 * model_bytes / network.bytes_per_second + network.latency_seconds


def gossip_seconds(model_bytes: float, network: Network) -> float:
    """Returns how long it takes to pull a partner's model, or to push one's own."""
    return model_bytes / network.bytes_per_second + network.latency_seconds


def most_exchanges_per_second(model_bytes: float, network: Network) -> float:
    """Returns how many exchanges a centre can bear, however many workers there are."""
    return 1.0 / centre_seconds(model_bytes, network)
