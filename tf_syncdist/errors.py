"""Exceptions of tf_syncdist, all under one base class."""

__all__ = [
    "AggregatorUnreachableError",
    "ClusterConfigError",
    "ModelMismatchError",
    "NonFiniteGradientError",
    "ServiceError",
    "SyncDistError",
    "UnsupportedVersionError",
    "WaitTimeoutError",
]


class SyncDistError(Exception):
    """Base class of every error that this package raises on its own."""


class ClusterConfigError(SyncDistError, ValueError):
    """TF_CONFIG, or the resolver that was given, does not describe a usable cluster."""


class AggregatorUnreachableError(SyncDistError, ConnectionError):
    """No aggregation service answered at an address within the time allowed."""


class ModelMismatchError(SyncDistError, ValueError):
    """Workers are about to train variables that differ in name, shape or dtype."""


class NonFiniteGradientError(SyncDistError, FloatingPointError):
    """A worker's own gradients hold NaN or Inf, and `nonfinite="error"` was given."""


class ServiceError(SyncDistError, RuntimeError):
    """The aggregation service refused a message or went away."""


class WaitTimeoutError(SyncDistError, TimeoutError):
    """A wait for other workers passed its deadline."""


class UnsupportedVersionError(SyncDistError, ImportError):
    """TensorFlow or Keras has moved something private that this package cannot do without."""
