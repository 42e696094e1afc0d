"""Post-activation bottleneck ResNet (He et al., 2015) with the 3x3 stem for small images."""

import jax
import jax.numpy as jnp
from flax import nnx

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv3x3(inplanes, planes, stride=1, *, rngs):
    return nnx.Conv(
        inplanes,
        planes,
        kernel_size=(3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        kernel_init=he_normal,
        rngs=rngs,
    )


def conv1x1(inplanes, planes, stride=1, *, rngs):
    return nnx.Conv(
        inplanes, planes, (1, 1), stride, use_bias=False, kernel_init=he_normal, rngs=rngs
    )


class Bottleneck(nnx.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, *, rngs):
        outplanes = planes * self.expansion
        self.conv1 = conv1x1(inplanes, planes, rngs=rngs)
        self.bn1 = nnx.BatchNorm(planes, momentum=0.9, rngs=rngs)
        self.conv2 = conv3x3(planes, planes, stride, rngs=rngs)
        self.bn2 = nnx.BatchNorm(planes, momentum=0.9, rngs=rngs)
        self.conv3 = conv1x1(planes, outplanes, rngs=rngs)
        self.bn3 = nnx.BatchNorm(outplanes, momentum=0.9, rngs=rngs)
        if stride != 1 or inplanes != outplanes:
            self.downsample = nnx.Sequential(
                conv1x1(inplanes, outplanes, stride, rngs=rngs),
                nnx.BatchNorm(outplanes, momentum=0.9, rngs=rngs),
            )
        else:
            self.downsample = None

    def __call__(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = jax.nn.relu(self.bn1(self.conv1(x)))
        out = jax.nn.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return jax.nn.relu(out)


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, width=8, layers=(2, 2, 2), rngs):
        self.conv1 = conv3x3(channels, 2 * width, 2, rngs=rngs)
        self.bn1 = nnx.BatchNorm(2 * width, momentum=0.9, rngs=rngs)
        blocks = []
        inplanes = 2 * width
        for stage, depth in enumerate(layers):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(inplanes, width << stage, stride, rngs=rngs))
                inplanes = (width << stage) * Bottleneck.expansion
        self.blocks = nnx.List(blocks)
        self.fc = nnx.Linear(inplanes, num_classes, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(x, axis=(1, 2))
        return self.fc(x)
