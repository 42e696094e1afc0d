"""ConvNeXt-like network (Liu et al., 2022) with BatchNorm in place of LayerNorm."""

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Depthwise conv -> norm -> pointwise -> GELU -> pointwise -> layer scale -> add."""

    def __init__(self, dim: int, kernel: int, layer_scale: float, *, rngs: nnx.Rngs):
        self.dwconv = nnx.Conv(dim, dim, (kernel, kernel), feature_group_count=dim, rngs=rngs)
        self.norm = nnx.BatchNorm(dim, momentum=0.9, rngs=rngs)
        self.pwconv1 = nnx.Linear(dim, 4 * dim, rngs=rngs)  # 1x1 convs as dense layers
        self.act = nnx.gelu
        self.pwconv2 = nnx.Linear(4 * dim, dim, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((dim,), layer_scale))

    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        x = self.dwconv(x)
        x = self.norm(x)
        x = self.pwconv1(x)
        x = self.act(x)
        x = self.pwconv2(x)
        x = self.gamma * x
        return residual + x


class Downsample(nnx.Module):
    def __init__(self, dim_in: int, dim_out: int, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(dim_in, momentum=0.9, rngs=rngs)
        self.conv = nnx.Conv(dim_in, dim_out, (2, 2), strides=2, padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.norm(x))


class Network(nnx.Module):
    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        *,
        dims: tuple[int, ...] = (32, 64, 128),
        depths: tuple[int, ...] = (2, 3, 2),
        kernels: tuple[int, ...] = (5, 3, 3),
        layer_scale: float = 0.1,
        rngs: nnx.Rngs,
    ):
        self.patchify = nnx.Conv(channels, dims[0], (4, 4), strides=4, padding=0, rngs=rngs)
        self.patch_norm = nnx.BatchNorm(dims[0], momentum=0.9, rngs=rngs)
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            down = [] if i == 0 else [Downsample(dims[i - 1], dim, rngs=rngs)]
            blocks = [Block(dim, kernels[i], layer_scale, rngs=rngs) for _ in range(depth)]
            stages.append(nnx.Sequential(*down, *blocks))
        self.stages = nnx.Sequential(*stages)
        self.norm = nnx.BatchNorm(dims[-1], momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(dims[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patch_norm(self.patchify(x))
        x = self.stages(x)
        x = self.norm(x.mean(axis=(1, 2)))  # of the pooled features, (batch, features)
        return self.head(x)
