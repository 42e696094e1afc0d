"""RepVGG-style plain network: 3x3, 1x1 and identity branches, each with its own BatchNorm."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

batch_norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class ConvBN(nnx.Module):
    def __init__(self, din, dout, kernel, stride, *, rngs: nnx.Rngs):
        pad = kernel // 2
        self.conv = nnx.Conv(
            din,
            dout,
            kernel_size=(kernel, kernel),
            strides=stride,
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            rngs=rngs,
        )
        self.bn = batch_norm(dout, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.conv(x))


class RepVGGBlock(nnx.Module):
    def __init__(self, din, dout, stride=1, *, rngs: nnx.Rngs):
        self.rbr_dense = ConvBN(din, dout, 3, stride, rngs=rngs)
        self.rbr_1x1 = ConvBN(din, dout, 1, stride, rngs=rngs)
        if din == dout and stride == 1:
            self.rbr_identity = batch_norm(din, rngs=rngs)
        else:
            self.rbr_identity = None

    def __call__(self, x):
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return nnx.relu(self.rbr_dense(x) + self.rbr_1x1(x) + identity)


class Network(nnx.Module):
    def __init__(
        self,
        num_classes=10,
        channels=3,
        *,
        widths=(16, 16, 32, 64),
        depths=(1, 2, 4, 2),
        rngs: nnx.Rngs,
    ):
        din = channels
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(RepVGGBlock(din, width, stride, rngs=rngs))
                din = width
            setattr(self, f"stage{i}", nnx.Sequential(*blocks))
        self.num_stages = len(widths)
        self.linear = nnx.Linear(din, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_stages):
            x = getattr(self, f"stage{i}")(x)
        x = jnp.mean(x, axis=(1, 2))
        return self.linear(x)
