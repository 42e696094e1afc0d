"""The networks as their papers and torchvision describe them: lists of layers, and their results.

Nothing here is taken from the package. A layer says its kernel, stride, padding and channels; from
the list follow every shape, the multiplications, and the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Layers = list[Any]


class Conv(NamedTuple):
    """A square convolution; ``groups`` as many as channels where it is depthwise."""

    kernel: int
    stride: int
    padding: int
    inputs: int
    outputs: int
    groups: int = 1

    @property
    def fan_in(self):
        return self.kernel**2 * self.inputs // self.groups


class Dense(NamedTuple):
    inputs: int
    outputs: int


class Pool(NamedTuple):
    """A max-pool; with ``ceil`` the last window may reach beyond the image."""

    window: int
    stride: int
    padding: int = 0
    ceil: bool = False

    def sides(self, extent):
        """Rows or columns added before and after so many."""
        left = (extent + 2 * self.padding - self.window) % self.stride
        beyond = self.stride - left if self.ceil and left else 0
        return self.padding, self.padding + beyond


class Sum(NamedTuple):
    """What both make of the input, added; no layers leave it as it is."""

    shortcut: Layers
    branch: Layers


class Concatenation(NamedTuple):
    """What both make of the input, channel after channel."""

    first: Layers
    second: Layers


class Shuffle(NamedTuple):
    """What both make of the input, or with ``split`` of its halves, channels in turn."""

    first: Layers
    second: Layers
    split: bool


class Subsampled(NamedTuple):
    """Every ``stride``-th pixel, with channels of zeros added (ResNet's option A)."""

    stride: int
    outputs: int


RELU, AVERAGE, FLATTEN = "relu", "average", "flatten"


class Step(NamedTuple):
    """A convolution or dense layer that was computed."""

    layer: Conv | Dense
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def multiplications(self):
        """Of one image."""
        if isinstance(self.layer, Dense):
            return self.layer.inputs * self.layer.outputs
        rows, columns, channels = self.outputs[1:]
        return rows * columns * channels * self.layer.fan_in


def run(layers: Layers, x: jax.Array, kernels: Iterator[jax.Array], steps: list[Step]) -> jax.Array:
    """Computes the layers; what was computed comes into ``steps``, kernels are taken in order."""
    for layer in layers:
        x = _run(layer, x, kernels, steps)
    return x


def _run(layer: Any, x: jax.Array, kernels: Iterator[jax.Array], steps: list[Step]) -> jax.Array:
    if layer == RELU:
        return jnp.maximum(x, 0)
    if layer == AVERAGE:
        return x.mean((1, 2))
    if layer == FLATTEN:
        return x.reshape(len(x), -1)
    if isinstance(layer, Pool):
        sides = ((0, 0), layer.sides(x.shape[1]), layer.sides(x.shape[2]), (0, 0))
        window, strides = (1, layer.window, layer.window, 1), (1, layer.stride, layer.stride, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, sides)
    if isinstance(layer, Subsampled):
        x = x[:, :: layer.stride, :: layer.stride]
        zeros = jnp.zeros((*x.shape[:-1], layer.outputs - x.shape[-1]), x.dtype)
        return jnp.concatenate([x, zeros], -1)
    if isinstance(layer, Sum):
        return run(layer.shortcut, x, kernels, steps) + run(layer.branch, x, kernels, steps)
    if isinstance(layer, Concatenation):
        both = run(layer.first, x, kernels, steps), run(layer.second, x, kernels, steps)
        return jnp.concatenate(both, -1)
    if isinstance(layer, Shuffle):
        half = x.shape[-1] // 2
        first, second = (x[..., :half], x[..., half:]) if layer.split else (x, x)
        both = run(layer.first, first, kernels, steps), run(layer.second, second, kernels, steps)
        grouped = jnp.concatenate(both, -1).reshape(*both[0].shape[:-1], 2, -1)
        return grouped.swapaxes(-1, -2).reshape(*both[0].shape[:-1], -1)
    kernel = next(kernels)
    if isinstance(layer, Dense):
        assert kernel.shape == layer
        y = x @ kernel
    else:
        shape = (layer.kernel, layer.kernel, layer.inputs // layer.groups, layer.outputs)
        assert kernel.shape == shape
        y = lax.conv_general_dilated(
            x,
            kernel,
            (layer.stride,) * 2,
            ((layer.padding,) * 2,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=layer.groups,
        )
    steps.append(Step(layer, x.shape, y.shape))
    return y


def kernel_shapes(layers: Layers) -> Iterator[tuple[int, ...]]:
    """Shapes of all kernels, in order."""
    for layer in layers:
        if isinstance(layer, Dense):
            yield tuple(layer)
        elif isinstance(layer, Conv):
            inputs = layer.inputs // layer.groups
            yield (layer.kernel, layer.kernel, inputs, layer.outputs)
        elif isinstance(layer, Sum | Concatenation | Shuffle):
            yield from kernel_shapes(layer[0])
            yield from kernel_shapes(layer[1])


def convolutions(layers: Layers) -> Iterator[Conv]:
    """All of them, in order."""
    for layer in layers:
        if isinstance(layer, Conv):
            yield layer
        elif isinstance(layer, Sum | Concatenation | Shuffle):
            yield from convolutions(layer[0])
            yield from convolutions(layer[1])


def vgg(stages: tuple[int, ...], *, classes: int, image_size: int) -> Layers:
    """Simonyan and Zisserman 2015, Table 1; for 32 pixels with one pixel left at the end."""
    layers: Layers = []
    inputs = 3
    for outputs, count in zip((64, 128, 256, 512, 512), stages, strict=True):
        for _ in range(count):
            layers += [Conv(3, 1, 1, inputs, outputs), RELU]
            inputs = outputs
        layers.append(Pool(2, 2))
    flat = 512 * (image_size // 32) ** 2
    return [
        *layers,
        *(FLATTEN, Dense(flat, 4096), RELU, Dense(4096, 4096), RELU, Dense(4096, classes)),
    ]


def resnet(stages: tuple[int, ...], *, bottleneck: bool, classes: int, image_size: int) -> Layers:
    """He et al. 2016, Table 1, with a bottleneck's stride in its 3x3 convolution.

    For 32 pixels a 3x3 convolution of stride 1 takes the place of the first layers.
    """
    small = [Conv(3, 1, 1, 3, 64), RELU]
    layers = small if image_size == 32 else [Conv(7, 2, 3, 3, 64), RELU, Pool(3, 2, 1)]
    inputs = 64
    for stage, (features, count) in enumerate(zip((64, 128, 256, 512), stages, strict=True)):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            outputs = 4 * features if bottleneck else features
            changed = stride > 1 or inputs != outputs
            shortcut = [Conv(1, stride, 0, inputs, outputs)] if changed else []
            if bottleneck:
                branch = [Conv(1, 1, 0, inputs, features), RELU]
                branch += [Conv(3, stride, 1, features, features), RELU]
                branch += [Conv(1, 1, 0, features, outputs)]
            else:
                branch = [Conv(3, stride, 1, inputs, features), RELU]
                branch += [Conv(3, 1, 1, features, features)]
            layers += [Sum(shortcut, branch), RELU]
            inputs = outputs
    return [*layers, AVERAGE, Dense(inputs, classes)]


def thin_resnet(depth: int, *, classes: int, image_size: int) -> Layers:
    """He et al. 2016, Section 4.2: 6n + 2 layers for CIFAR, with shortcuts of option A."""
    layers: Layers = [Conv(3, 1, 1, 3, 16), RELU]
    inputs = 16
    for features in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            stride = features // inputs
            shortcut = [Subsampled(stride, features)] if stride > 1 else []
            branch = [Conv(3, stride, 1, inputs, features), RELU]
            layers += [Sum(shortcut, [*branch, Conv(3, 1, 1, features, features)]), RELU]
            inputs = features
    return [*layers, AVERAGE, Dense(64, classes)]


def squeezenet(*, classes: int, image_size: int, as_torchvision: bool = False) -> Layers:
    """Iandola et al. 2016, Table 1 (1.0) with Figure 2's simple bypass.

    The pools are of 2x2 and the first convolution is padded, as in MimicNorm's experiments; the
    last layer, a 1x1 convolution, comes after the average. torchvision's have 3x3 and no padding,
    its last layer comes before a ReLU and the average, and there is no bypass.
    """

    def fire(inputs: int, squeeze: int, expand: int) -> Layers:
        sides = (
            [Conv(1, 1, 0, squeeze, expand), RELU],
            [Conv(3, 1, 1, squeeze, expand), RELU],
        )
        return [Conv(1, 1, 0, inputs, squeeze), RELU, Concatenation(*sides)]

    def bypassed(*features: int) -> Layers:
        return fire(*features) if as_torchvision else [Sum([], fire(*features))]

    if as_torchvision:
        first, pool = Conv(7, 2, 0, 3, 96), Pool(3, 2, ceil=True)
        last: Layers = [Conv(1, 1, 0, 512, classes), RELU, AVERAGE]
    else:
        first = Conv(3, 1, 1, 3, 96) if image_size == 32 else Conv(7, 2, 3, 3, 96)
        pool, last = Pool(2, 2), [AVERAGE, Dense(512, classes)]
    return [
        *(first, RELU, pool),
        *fire(96, 16, 64),  # fire 2
        *bypassed(128, 16, 64),
        *fire(128, 32, 128),
        pool,
        *bypassed(256, 32, 128),  # fire 5
        *fire(256, 48, 192),
        *bypassed(384, 48, 192),
        *fire(384, 64, 256),  # fire 8
        pool,
        *fire(512, 64, 256),
        *last,
    ]


def shufflenet(features: tuple[int, ...], *, classes: int, image_size: int) -> Layers:
    """Ma et al. 2018, Table 5 and Figure 3 (c) and (d); for 32 pixels with a stem of stride 1."""

    def depthwise(stride: int, channels: int) -> Conv:
        return Conv(3, stride, 1, channels, channels, groups=channels)

    if image_size == 32:
        layers: Layers = [Conv(3, 1, 1, 3, 24), RELU]
    else:
        layers = [Conv(3, 2, 1, 3, 24), RELU, Pool(3, 2, 1)]
    inputs = 24
    *stages, last = features
    for outputs, repeats in zip(stages, (3, 7, 3), strict=True):
        half = outputs // 2
        shortcut = [depthwise(2, inputs), Conv(1, 1, 0, inputs, half), RELU]
        branch = [Conv(1, 1, 0, inputs, half), RELU, depthwise(2, half)]
        layers.append(Shuffle(shortcut, [*branch, Conv(1, 1, 0, half, half), RELU], split=False))
        for _ in range(repeats):
            branch = [Conv(1, 1, 0, half, half), RELU, depthwise(1, half)]
            layers.append(Shuffle([], [*branch, Conv(1, 1, 0, half, half), RELU], split=True))
        inputs = outputs
    return [*layers, Conv(1, 1, 0, inputs, last), RELU, AVERAGE, Dense(last, classes)]


def mlp(*, classes: int, image_size: int) -> Layers:
    """The paper's eq. 1, of three layers."""
    pixels = 3 * image_size**2
    return [FLATTEN, Dense(pixels, 256), RELU, Dense(256, 256), RELU, Dense(256, classes)]


def layers_of(network: str, *, classes: int, image_size: int) -> Layers:
    """The list of a network by its name."""
    sizes = {"classes": classes, "image_size": image_size}
    stages = {
        "vgg11": (1, 1, 2, 2, 2),
        "vgg13": (2, 2, 2, 2, 2),
        "vgg16": (2, 2, 3, 3, 3),
        "vgg19": (2, 2, 4, 4, 4),
        "resnet18": (2, 2, 2, 2),
        "resnet34": (3, 4, 6, 3),
        "resnet50": (3, 4, 6, 3),
        "resnet101": (3, 4, 23, 3),
        "resnet152": (3, 8, 36, 3),
        "shufflenetv2_x0_5": (48, 96, 192, 1024),
        "shufflenetv2_x1_0": (116, 232, 464, 1024),
        "shufflenetv2_x1_5": (176, 352, 704, 1024),
        "shufflenetv2_x2_0": (244, 488, 976, 2048),
    }.get(network, ())
    if network == "mlp":
        return mlp(**sizes)
    if network == "squeezenet":
        return squeezenet(**sizes)
    if network.startswith("vgg"):
        return vgg(stages, **sizes)
    if network.startswith("shufflenet"):
        return shufflenet(stages, **sizes)
    if stages:
        return resnet(stages, bottleneck=int(network[6:]) >= 50, **sizes)
    return thin_resnet(int(network[6:]), **sizes)
