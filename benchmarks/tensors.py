"""The tensors that the all-reduce benchmark exchanges."""

from __future__ import annotations

import math
from collections.abc import Sequence

RESNET50 = "resnet50"

Shape = tuple[int, ...]


def shapes(model: str, megabytes: float) -> list[Shape]:
    """Returns the shapes of one exchange: of the model's tensors, or of one tensor of this size.

    Args:
        model: "resnet50" or empty.
        megabytes: 10**6 bytes; not used with a model.
    """
    if model == RESNET50:
        return _resnet50()
    return [(max(1, round(megabytes * 1e6 / 4)),)]


def total_elements(tensor_shapes: Sequence[Shape]) -> int:
    """Returns how many float32 values tensors of these shapes have."""
    return sum(math.prod(shape) for shape in tensor_shapes)


def megabytes_of(tensor_shapes: Sequence[Shape]) -> float:
    """Returns how many 10**6 bytes tensors of these shapes have."""
    return total_elements(tensor_shapes) * 4 / 1e6


def _resnet50() -> list[Shape]:
    """Returns the trainable tensors of ResNet-50 as published.

    Its convolutions have no bias, which makes 53 kernels, 53 pairs of gamma and beta, and the
    last layer's kernel and bias: 161 tensors, 25 557 032 values. Keras' ResNet50 gives each
    convolution a bias on top, hence 214 tensors.
    """
    found: list[Shape] = []

    def convolution(size: int, channels_in: int, channels_out: int) -> None:
        found.extend([(size, size, channels_in, channels_out), (channels_out,), (channels_out,)])

    convolution(7, 3, 64)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            if block == 0:
                convolution(1, channels, 4 * width)
            convolution(1, channels, width)
            convolution(3, width, width)
            convolution(1, width, 4 * width)
            channels = 4 * width
    return [*found, (channels, 1000), (1000,)]
