"""Straggler-tolerant multi-worker training for Keras 3.

Names are loaded when they are first used, so that the aggregation service starts without
TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tf_syncdist import callbacks, cutoff, errors
    from tf_syncdist.strategies.asynchronous import AsyncStrategy
    from tf_syncdist.strategies.elastic_averaging import ElasticAveragingStrategy
    from tf_syncdist.strategies.gossip import GossipStrategy
    from tf_syncdist.strategies.model_averaging import ModelAveragingStrategy
    from tf_syncdist.strategies.sync_replicas import SyncReplicasStrategy
    from tf_syncdist.strategies.variables import variables_sha256

__version__ = "0.1.0"

__all__ = [
    "AsyncStrategy",
    "ElasticAveragingStrategy",
    "GossipStrategy",
    "ModelAveragingStrategy",
    "SyncReplicasStrategy",
    "callbacks",
    "cutoff",
    "errors",
    "variables_sha256",
]

_HOMES = {
    "AsyncStrategy": "tf_syncdist.strategies.asynchronous",
    "ElasticAveragingStrategy": "tf_syncdist.strategies.elastic_averaging",
    "GossipStrategy": "tf_syncdist.strategies.gossip",
    "ModelAveragingStrategy": "tf_syncdist.strategies.model_averaging",
    "SyncReplicasStrategy": "tf_syncdist.strategies.sync_replicas",
    "variables_sha256": "tf_syncdist.strategies.variables",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
