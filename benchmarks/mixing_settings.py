"""What all runs of benchmarks.mixing have in common."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """How a model is trained and tested.

    Args:
        batch_size: Batch of a learner or a worker.
        learning_rate: Of SGD with momentum 0.9.
        target: Test accuracy at which a run ends.
        epochs: Passes over the data after which it ends.
        most_seconds: Seconds of training after which it ends.
        tests_per_epoch: How often the model is tested in a pass over the data.
        filters: Filters of each convolution of the network.
        op_threads: Threads for one operation in the part learners; 0 for TensorFlow's default.
        central_momentum: Of the central model in the part learners.
    """

    batch_size: int
    learning_rate: float
    target: float
    epochs: float
    most_seconds: float
    tests_per_epoch: int
    filters: list[int]
    op_threads: int
    central_momentum: float
