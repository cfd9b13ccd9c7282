"""How many batches an epoch has, where that is not what Keras counts."""

from typing import Any


class CountedBatches:
    """Keras' data adapter, with another number of batches in an epoch.

    Args:
        data_adapter: Keras' own.
        num_batches: How many there are.
    """

    def __init__(self, data_adapter: Any, num_batches: int) -> None:
        self._adapter = data_adapter
        self.num_batches = num_batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)
