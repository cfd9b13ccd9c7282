"""Layer tables of VGG-19 and ResNet-50, scaled to what a small machine can exchange. Pure.

The tables are those of the papers at 224 x 224 pixels and 1000 classes: VGG-19 of Simonyan and
Zisserman (arXiv 1409.1556, table 1, column E), ResNet-50 of He et al. (arXiv 1512.03385, table 1)
with the batch normalisation's scales and offsets, and with the stride in the 3 x 3 convolutions.
A scaled model has every number of channels, units and classes multiplied by a factor, so its
parameters shrink by the square and the shares of the layers stay what they are, biases aside. The
shares of the computing are those of the unscaled tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

# A third of a step is its forward pass, as the simulations of P3's digest assume.
FORWARD_SHARE = 1 / 3
BYTES_PER_PARAMETER = 4

_IMAGE_CHANNELS = 3
_CLASSES = 1000
PIXELS = 224
_VGG_CHANNELS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
_VGG_UNITS = 4096
_RESNET_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_RESNET_EXPANSION = 4


class Layer(NamedTuple):
    """What a layer holds and computes.

    Args:
        name: Its name.
        shapes: Shapes of its variables.
        flops: Multiplications of its forward pass of one example, in the unscaled model.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    flops: int

    @property
    def parameters(self) -> int:
        """How many elements its variables have."""
        return sum(map(math.prod, self.shapes))


class Model(NamedTuple):
    """A model's layers in the order of the forward pass.

    Args:
        name: Its name.
        layers: The layers.
    """

    name: str
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        """How many elements all variables have."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """What travels in one direction per step."""
        return self.parameters * BYTES_PER_PARAMETER

    def compute_seconds(self, step_seconds: float) -> list[tuple[float, float]]:
        """Divides the computing of a step among the layers, by their multiplications.

        Args:
            step_seconds: Forward and backward pass together.

        Returns:
            Seconds of the forward and of the backward pass of each layer.
        """
        total = sum(layer.flops for layer in self.layers)
        each = [step_seconds * layer.flops / total for layer in self.layers]
        return [(FORWARD_SHARE * share, (1 - FORWARD_SHARE) * share) for share in each]

    def exchange_seconds(self, gbps: float) -> float:
        """Returns how long the bytes of one direction take; 0 on a link without limit (0 Gb/s)."""
        return self.num_bytes * 8e-9 / gbps if gbps else 0.0

    def gbps(self, ratio: float, compute_seconds: float) -> float:
        """Returns the bandwidth on which one direction takes `ratio` of the computing.

        Args:
            ratio: Exchange to computing; 0 stands for a link without limit.
            compute_seconds: Forward and backward pass together.
        """
        return self.num_bytes * 8e-9 / (ratio * compute_seconds) if ratio else 0.0


def vgg19(factor: float = 1.0) -> Model:
    """Returns VGG-19 with every number of channels multiplied by `factor`."""
    return Model("vgg19", tuple(_vgg19(_scale(factor))))


def resnet50(factor: float = 1.0) -> Model:
    """Returns ResNet-50 with every number of channels multiplied by `factor`."""
    return Model("resnet50", tuple(_resnet50(_scale(factor))))


# What the benchmark trains: 9.0 and 6.4 million parameters.
MODELS: dict[str, Callable[[], Model]] = {
    "vgg19": lambda: vgg19(1 / 4),
    "resnet50": lambda: resnet50(1 / 2),
}


def _scale(factor: float) -> Callable[[int], int]:
    return lambda channels: max(1, round(channels * factor))


def _vgg19(scaled: Callable[[int], int]) -> Iterator[Layer]:
    before, pixels = _IMAGE_CHANNELS, PIXELS
    for block, (channels, convolutions) in enumerate(_VGG_CHANNELS, 1):
        for number in range(1, convolutions + 1):
            flops = pixels**2 * 9 * before * channels
            inputs = before if before == _IMAGE_CHANNELS else scaled(before)
            shapes = ((3, 3, inputs, scaled(channels)), (scaled(channels),))
            yield Layer(f"conv{block}_{number}", shapes, flops)
            before = channels
        pixels //= 2
    area, inputs, units = pixels**2, before, (_VGG_UNITS, _VGG_UNITS, _CLASSES)
    for number, outputs in enumerate(units, 1):
        shapes = ((area * scaled(inputs), scaled(outputs)), (scaled(outputs),))
        yield Layer(f"fc{number}", shapes, area * inputs * outputs)
        area, inputs = 1, outputs


def _resnet50(scaled: Callable[[int], int]) -> Iterator[Layer]:
    def convolution(name: str, size: int, before: int, channels: int, pixels: int) -> Layer:
        inputs, outputs = before if before == _IMAGE_CHANNELS else scaled(before), scaled(channels)
        # The kernel, and scale and offset of the batch normalisation behind it.
        shapes = ((size, size, inputs, outputs), (outputs,), (outputs,))
        return Layer(name, shapes, pixels**2 * size**2 * before * channels)

    pixels = PIXELS // 2
    yield convolution("conv1", 7, _IMAGE_CHANNELS, 64, pixels)
    before, pixels = 64, pixels // 2
    for stage, (channels, blocks) in enumerate(_RESNET_STAGES, 2):
        for block in range(1, blocks + 1):
            name, outputs = f"conv{stage}_{block}", channels * _RESNET_EXPANSION
            # The first block of a stage halves the image, but for the first stage.
            after = pixels // 2 if block == 1 and stage > 2 else pixels
            if block == 1:
                yield convolution(f"{name}_0", 1, before, outputs, after)
            yield convolution(f"{name}_1", 1, before, channels, pixels)
            yield convolution(f"{name}_2", 3, channels, channels, after)
            yield convolution(f"{name}_3", 1, channels, outputs, after)
            before, pixels = outputs, after
    shapes = ((scaled(before), scaled(_CLASSES)), (scaled(_CLASSES),))
    yield Layer("fc", shapes, before * _CLASSES)
