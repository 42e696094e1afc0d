"""EfficientNet-like network (Tan & Le, 2019): MBConv blocks with SE gates and SiLU."""

import math
from typing import NamedTuple

import jax
from flax import nnx


class BlockArgs(NamedTuple):
    expand: int
    kernel: int
    stride: int
    features: int
    repeats: int


BLOCKS = (
    BlockArgs(expand=1, kernel=3, stride=1, features=8, repeats=1),
    BlockArgs(expand=3, kernel=3, stride=2, features=16, repeats=2),
    BlockArgs(expand=4, kernel=5, stride=2, features=24, repeats=1),
    BlockArgs(expand=4, kernel=3, stride=1, features=32, repeats=2),
)
BN = {"momentum": 0.9, "epsilon": 1e-3}


class MBConv(nnx.Module):
    def __init__(self, inputs: int, args: BlockArgs, stride: int, *, rngs: nnx.Rngs):
        mid = inputs * args.expand
        self.residual = stride == 1 and inputs == args.features
        if args.expand > 1:
            self.expand_conv = nnx.Conv(inputs, mid, (1, 1), use_bias=False, rngs=rngs)
            self.expand_bn = nnx.BatchNorm(mid, rngs=rngs, **BN)
        self.depthwise_conv = nnx.Conv(
            mid, mid, (args.kernel,) * 2, stride, feature_group_count=mid, use_bias=False, rngs=rngs
        )
        self.depthwise_bn = nnx.BatchNorm(mid, rngs=rngs, **BN)
        self.se_reduce = nnx.Conv(mid, max(8, inputs // 4), (1, 1), rngs=rngs)
        self.se_expand = nnx.Conv(max(8, inputs // 4), mid, (1, 1), rngs=rngs)
        self.project_conv = nnx.Conv(mid, args.features, (1, 1), use_bias=False, rngs=rngs)
        self.project_bn = nnx.BatchNorm(args.features, rngs=rngs, **BN)

    def __call__(self, inputs):
        x = inputs
        if hasattr(self, "expand_conv"):
            x = nnx.silu(self.expand_bn(self.expand_conv(x)))
        x = nnx.silu(self.depthwise_bn(self.depthwise_conv(x)))
        gate = self.se_reduce(x.mean(axis=(1, 2), keepdims=True))
        x = x * jax.nn.sigmoid(self.se_expand(nnx.silu(gate)))
        x = self.project_bn(self.project_conv(x))
        return x + inputs if self.residual else x


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, width=1.0, depth=1.0, rngs):
        def scaled(features):
            return max(8, 8 * round(features * width / 8))

        self.stem = nnx.Conv(channels, scaled(8), (3, 3), (2, 2), use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(scaled(8), rngs=rngs, **BN)
        self.blocks, features = nnx.List([]), scaled(8)
        for args in BLOCKS:
            args = args._replace(features=scaled(args.features))
            for i in range(math.ceil(args.repeats * depth)):
                stride = args.stride if i == 0 else 1
                self.blocks.append(MBConv(features, args, stride, rngs=rngs))
                features = args.features
        self.top = nnx.Conv(features, 4 * features, (1, 1), use_bias=False, rngs=rngs)
        self.top_bn = nnx.BatchNorm(4 * features, rngs=rngs, **BN)
        self.dense = nnx.Linear(4 * features, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.stem_bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.silu(self.top_bn(self.top(x)))
        return self.dense(x.mean(axis=(1, 2)))
