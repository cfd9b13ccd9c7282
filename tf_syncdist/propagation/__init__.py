"""What travels as what, and in which order: buckets, slices, priorities. Pure."""

from tf_syncdist.propagation.policies import (
    AutoPropagation,
    FifoPropagation,
    PriorityPropagation,
    Propagation,
    serialize,
)

__all__ = [
    "AutoPropagation",
    "FifoPropagation",
    "PriorityPropagation",
    "Propagation",
    "serialize",
]
