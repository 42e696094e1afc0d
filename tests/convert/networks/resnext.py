"""Small ResNeXt with Res2Net-style splits, ResNet-D shortcuts, blur pooling and PReLU."""

import jax
import jax.numpy as jnp
from flax import nnx


def blur_pool(x, stride=2):
    """Fixed binomial low-pass filter, then subsampling (Zhang, 2019)."""
    c = x.shape[-1]
    taps = jnp.array([1.0, 2.0, 1.0], x.dtype) / 4.0
    kernel = jnp.tile(jnp.outer(taps, taps)[:, :, None, None], (1, 1, 1, c))
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=dims, feature_group_count=c
    )


class PReLU(nnx.Module):
    def __init__(self, features, init=0.25):
        self.slope = nnx.Param(jnp.full((features,), init))

    def __call__(self, x):
        return jnp.where(x >= 0, x, self.slope[...] * x)


class Bottleneck(nnx.Module):
    """1x1 -> hierarchical grouped 3x3 on `scale` splits -> 1x1, plus the shortcut."""

    def __init__(self, din, width, dout, stride=1, groups=4, scale=2, *, rngs):
        self.stride, self.scale, split = stride, scale, width // scale
        self.conv1 = nnx.Conv(din, width, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.act1 = PReLU(width)
        self.convs, self.bns = nnx.List([]), nnx.List([])
        for _ in range(scale):
            self.convs.append(
                nnx.Conv(
                    split, split, (3, 3), feature_group_count=groups, use_bias=False, rngs=rngs
                )
            )
            self.bns.append(nnx.BatchNorm(split, momentum=0.9, rngs=rngs))
        self.conv3 = nnx.Conv(width, dout, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(dout, momentum=0.9, rngs=rngs)
        self.act3 = PReLU(dout)
        self.has_down = stride > 1 or din != dout
        if self.has_down:
            self.down_conv = nnx.Conv(din, dout, (1, 1), use_bias=False, rngs=rngs)
            self.down_bn = nnx.BatchNorm(dout, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        y, outs, prev = self.act1(self.bn1(self.conv1(x))), [], 0.0
        pieces = jnp.split(y, self.scale, axis=-1)
        for piece, conv, bn in zip(pieces, self.convs, self.bns, strict=True):
            prev = nnx.leaky_relu(bn(conv(piece + prev)), negative_slope=0.1)
            outs.append(prev)
        y = jnp.concatenate(outs, axis=-1)
        if self.stride > 1:
            y = blur_pool(y, self.stride)
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        if self.has_down:
            x = self.down_bn(self.down_conv(x))
        return self.act3(self.bn3(self.conv3(y)) + x)


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(channels, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        plan = [(16, 32, 64, 2), (64, 32, 64, 1), (64, 64, 96, 2), (96, 64, 96, 1)]
        self.blocks = nnx.List([Bottleneck(i, w, o, s, rngs=rngs) for i, w, o, s in plan])
        self.fc = nnx.Linear(96, num_classes, rngs=rngs)

    def __call__(self, images):
        x = nnx.leaky_relu(self.stem_bn(self.stem(images)), negative_slope=0.1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(axis=(1, 2)))
