"""ResNet whose equal blocks are built by nnx.vmap and run by nnx.scan."""

import jax
import jax.numpy as jnp
from flax import nnx


class BasicBlock(nnx.Module):
    def __init__(self, din: int, dout: int, strides: int = 1, *, rngs: nnx.Rngs):
        self.conv_a = nnx.Conv(din, dout, (3, 3), strides, use_bias=False, rngs=rngs)
        self.bn_a = nnx.BatchNorm(dout, momentum=0.9, rngs=rngs)
        self.conv_b = nnx.Conv(dout, dout, (3, 3), use_bias=False, rngs=rngs)
        self.bn_b = nnx.BatchNorm(dout, momentum=0.9, rngs=rngs)
        self.project = strides != 1 or din != dout
        if self.project:
            self.conv_p = nnx.Conv(din, dout, (1, 1), strides, use_bias=False, rngs=rngs)
            self.bn_p = nnx.BatchNorm(dout, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn_a(self.conv_a(x)))
        y = self.bn_b(self.conv_b(y))
        if self.project:
            x = self.bn_p(self.conv_p(x))
        return nnx.relu(x + y)


class Stage(nnx.Module):
    """A first block that may change the shape, then `repeats` equal blocks, stacked."""

    def __init__(self, din: int, dout: int, strides: int, repeats: int, *, rngs: nnx.Rngs):
        self.first = BasicBlock(din, dout, strides, rngs=rngs)

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs):
            return BasicBlock(dout, dout, rngs=rngs)

        self.rest = create(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        # unrolled, as convolutions inside of a loop are slow on CPUs
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, unroll=True)
        def run(block: BasicBlock, x: jax.Array):
            return block(x)

        return run(self.rest, self.first(x))


class Network(nnx.Module):
    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        *,
        base: int = 16,
        repeats: int = 2,
        rngs: nnx.Rngs,
    ):
        self.stem = nnx.Conv(channels, base, (3, 3), 2, use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(base, momentum=0.9, rngs=rngs)
        self.stage1 = Stage(base, base, 1, repeats, rngs=rngs)
        self.stage2 = Stage(base, 2 * base, 2, repeats, rngs=rngs)
        self.stage3 = Stage(2 * base, 4 * base, 2, repeats, rngs=rngs)
        self.readout = nnx.Linear(4 * base, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_bn(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.readout(jnp.mean(x, axis=(1, 2)))
