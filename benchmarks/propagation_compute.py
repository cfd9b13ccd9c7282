"""What a worker of benchmarks.propagation computes: layers that sleep, or real ones of Keras."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from benchmarks import propagation_clock, propagation_models

# Enough for gradients that differ from step to step, too little for a value to overflow.
_STRENGTH = np.float32(1e-3)


class SleepingLayer(keras.layers.Layer):
    """Holds a layer's variables and sleeps for as long as it would compute.

    Its forward pass needs its own variables and the activation of the layer before it, and its
    backward pass that of the layer behind it, as those of a real layer do.

    Args:
        layer: What it stands for.
        seconds: Its share of the forward and of the backward pass.
        clock: Of the worker.
        is_first: Whether it is the first one of the model.
    """

    def __init__(
        self,
        layer: propagation_models.Layer,
        seconds: tuple[float, float],
        clock: propagation_clock.Clock,
        is_first: bool,
    ) -> None:
        super().__init__(name=layer.name)
        self._shapes = layer.shapes
        self._seconds = seconds
        self._clock = clock
        self._is_first = is_first

    def build(self, _: object) -> None:
        """Makes the variables."""
        self._parameters = [
            self.add_weight(name=f"variable_{number}", shape=shape, initializer="ones")
            for number, shape in enumerate(self._shapes)
        ]

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """Returns the shape of a scalar."""
        return input_shape

    def call(self, activation: tf.Tensor) -> tf.Tensor:
        """Sleeps, and passes on a scalar that depends on the variables."""
        clock, (forward_seconds, backward_seconds) = self._clock, self._seconds

        def forward(x: np.ndarray, *elements: np.ndarray) -> np.ndarray:
            clock.work(forward_seconds, is_first=self._is_first)
            return np.float32(x + _STRENGTH * sum(elements))

        def backward(upstream: np.ndarray) -> np.ndarray:
            clock.work(backward_seconds, is_last=self._is_first)
            return np.float32(upstream * (1 - _STRENGTH))

        @tf.custom_gradient
        def sleep(x: tf.Tensor, *parameters: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            # One element of each: the read has to be over, but nothing is to be copied.
            elements = [tf.reshape(p, [-1])[0] for p in parameters]
            # One with a state would be kept in the order of the program by TensorFlow, and what
            # sends a gradient would wait for the last layer.
            y = tf.numpy_function(forward, [x, *elements], tf.float32, stateful=False)
            y.set_shape(())

            def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
                dx = tf.numpy_function(backward, [upstream], tf.float32, stateful=False)
                dx.set_shape(())
                value = dx * x * _STRENGTH
                return dx, *[tf.fill(shape, value) for shape in self._shapes]

            return y, gradient

        return sleep(activation, *map(tf.convert_to_tensor, self._parameters))


def sleeping_layers(
    model: propagation_models.Model, step_seconds: float, clock: propagation_clock.Clock
) -> list[SleepingLayer]:
    """Returns built layers, each of which sleeps its share of a step."""
    seconds = model.compute_seconds(step_seconds)
    layers = [
        SleepingLayer(layer, share, clock, is_first=number == 0)
        for number, (layer, share) in enumerate(zip(model.layers, seconds, strict=True))
    ]
    for layer in layers:
        layer.build(None)
        layer.built = True
    return layers


def real_model(model: propagation_models.Model) -> keras.Model:
    """Returns the model as one of Keras; it takes images of 224 x 224 pixels."""
    images = keras.Input((propagation_models.PIXELS, propagation_models.PIXELS, 3))
    make = {"vgg19": _vgg19, "resnet50": _resnet50}[model.name]
    made = keras.Model(images, make(images, {layer.name: layer.shapes for layer in model.layers}))
    parameters = sum(int(np.prod(v.shape)) for v in made.trainable_variables)
    if parameters != model.parameters:
        raise AssertionError(f"{model.name} has {parameters} parameters, not {model.parameters}")
    return made


_Shapes = dict[str, Sequence[tuple[int, ...]]]


def _vgg19(x: keras.KerasTensor, shapes: _Shapes) -> keras.KerasTensor:
    names = list(shapes)
    for name, after in zip(names, [*names[1:], ""], strict=True):
        kernel = shapes[name][0]
        if name.startswith("conv"):
            x = keras.layers.Conv2D(kernel[-1], 3, padding="same", activation="relu")(x)
            if after[:5] != name[:5]:
                x = keras.layers.MaxPooling2D()(x)
        else:
            x = keras.layers.Flatten()(x)
            x = keras.layers.Dense(kernel[-1], "relu" if after else None)(x)
    return x


def _resnet50(x: keras.KerasTensor, shapes: _Shapes) -> keras.KerasTensor:
    def convolution(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        size, *_, channels = shapes[name][0]
        stage, *block = name.removeprefix("conv").split("_")
        halves = name == "conv1" or (int(stage) > 2 and block in (["1", "0"], ["1", "2"]))
        x = keras.layers.Conv2D(channels, size, 2 if halves else 1, "same", use_bias=False)(x)
        return keras.layers.BatchNormalization()(x)

    x = keras.layers.ReLU()(convolution(x, "conv1"))
    x = keras.layers.MaxPooling2D(3, 2, "same")(x)
    blocks = list(dict.fromkeys(n.rpartition("_")[0] for n in shapes if n.count("_") == 2))
    for block in blocks:
        shortcut = convolution(x, f"{block}_0") if f"{block}_0" in shapes else x
        for number in (1, 2):
            x = keras.layers.ReLU()(convolution(x, f"{block}_{number}"))
        x = keras.layers.ReLU()(convolution(x, f"{block}_3") + shortcut)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.layers.Dense(shapes["fc"][0][-1])(x)
