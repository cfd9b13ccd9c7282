"""Exceptions of tf_syncdist, all under one base class. docs/errors.md has a section on each."""

__all__ = [
    "AggregatorUnreachableError",
    "BackupError",
    "ClusterConfigError",
    "CredentialsError",
    "ModelMismatchError",
    "NonFiniteGradientError",
    "RunTimeModelError",
    "ServiceError",
    "SyncDistError",
    "TraceError",
    "UnsupportedVersionError",
    "WaitTimeoutError",
]


class SyncDistError(Exception):
    """Base class of every error that this package raises on its own.

    See docs/errors.md#syncdisterror.
    """


class ClusterConfigError(SyncDistError, ValueError):
    """TF_CONFIG, or the resolver that was given, does not describe a usable cluster.

    See docs/errors.md#clusterconfigerror.
    """


class CredentialsError(SyncDistError, ValueError):
    """Certificates, a key or the job's token cannot be used, or would be exposed.

    See docs/errors.md#credentialserror.
    """


class AggregatorUnreachableError(SyncDistError, ConnectionError):
    """No aggregation service answered at an address within the time allowed.

    See docs/errors.md#aggregatorunreachableerror.
    """


class BackupError(SyncDistError, ValueError):
    """A backup from which training is to go on cannot be used.

    See docs/errors.md#backuperror.
    """


class ModelMismatchError(SyncDistError, ValueError):
    """Workers are about to train variables that differ in name, shape or dtype.

    See docs/errors.md#modelmismatcherror.
    """


class NonFiniteGradientError(SyncDistError, FloatingPointError):
    """A worker's own gradients hold NaN or Inf, and `nonfinite="error"` was given.

    See docs/errors.md#nonfinitegradienterror.
    """


class RunTimeModelError(SyncDistError, ValueError):
    """A file with a model of the workers' run-times cannot be used, or is of other workers.

    See docs/errors.md#runtimemodelerror.
    """


class ServiceError(SyncDistError, RuntimeError):
    """The aggregation service refused a message or went away.

    See docs/errors.md#serviceerror.
    """


class WaitTimeoutError(SyncDistError, TimeoutError):
    """A wait for other workers passed its deadline.

    See docs/errors.md#waittimeouterror.
    """


class TraceError(SyncDistError, ValueError):
    """A trace of run-times cannot be used, or is of other workers.

    See docs/errors.md#traceerror.
    """


class UnsupportedVersionError(SyncDistError, ImportError):
    """TensorFlow or Keras has moved something private that this package cannot do without.

    See docs/errors.md#unsupportedversionerror.
    """
