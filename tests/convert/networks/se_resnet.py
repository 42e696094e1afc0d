"""SE-ResNet (Hu et al., 2018) of basic blocks, activations as attributes, stages in a Dict."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class SqueezeExcite(nnx.Module):
    def __init__(self, features: int, reduction: int = 4, *, rngs: nnx.Rngs):
        self.squeeze = nnx.Linear(features, features // reduction, rngs=rngs)
        self.excite = nnx.Linear(features // reduction, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jnp.mean(x, axis=(1, 2))
        scale = nnx.relu(self.squeeze(scale))
        scale = nnx.sigmoid(self.excite(scale))
        return x * scale[:, None, None, :]


class ConvNorm(nnx.Module):
    def __init__(self, din, dout, kernel, stride=1, *, zero_init=False, rngs):
        self.conv = nnx.Conv(
            din, dout, (kernel, kernel), (stride, stride), use_bias=False, rngs=rngs
        )
        # the scale of the last BatchNorm in a branch starts at zero (Goyal et al., 2017)
        init = nnx.initializers.zeros_init() if zero_init else nnx.initializers.ones_init()
        self.norm = nnx.BatchNorm(dout, momentum=0.9, scale_init=init, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class SEBasicBlock(nnx.Module):
    def __init__(self, din: int, dout: int, stride: int, act: Callable, *, rngs: nnx.Rngs):
        self.act = act
        self.first = ConvNorm(din, dout, 3, stride, rngs=rngs)
        self.second = ConvNorm(dout, dout, 3, zero_init=True, rngs=rngs)
        self.se = SqueezeExcite(dout, rngs=rngs)
        self.match = ConvNorm(din, dout, 1, stride, rngs=rngs) if din != dout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        skip = self.match(x) if self.match is not None else x
        x = self.act(self.first(x))
        x = self.second(x)
        return self.act(skip + self.se(x))


class Network(nnx.Module):
    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        *,
        features: tuple[int, ...] = (16, 32, 64),
        blocks_per_stage: int = 2,
        act: Callable = nnx.relu,
        rngs: nnx.Rngs,
    ):
        self.act = act
        self.stem = ConvNorm(channels, features[0], 3, 2, rngs=rngs)
        self.stages = nnx.Dict({})
        din = features[0]
        for number, dout in enumerate(features, start=1):
            stage = nnx.List([])
            for _ in range(blocks_per_stage):
                stage.append(SEBasicBlock(din, dout, 1 if din == dout else 2, act, rngs=rngs))
                din = dout
            self.stages[f"stage{number}"] = stage
        self.classifier = nnx.Linear(din, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.act(self.stem(x))
        for number in range(1, len(self.stages) + 1):
            for block in self.stages[f"stage{number}"]:
                x = block(x)
        return self.classifier(jnp.mean(x, axis=(1, 2)))
