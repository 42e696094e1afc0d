"""U-Net (Ronneberger et al., 2015) as a classifier: the pooled decoder output goes to a dense."""

import jax.numpy as jnp
from flax import nnx


def activate(x):
    return jnp.maximum(x, 0.0)


class DoubleConv(nnx.Module):
    def __init__(self, in_features, out_features, rngs):
        self.c1 = nnx.Conv(in_features, out_features, kernel_size=(3, 3), rngs=rngs)
        self.n1 = nnx.BatchNorm(out_features, momentum=0.9, rngs=rngs)
        self.c2 = nnx.Conv(out_features, out_features, kernel_size=(3, 3), rngs=rngs)
        self.n2 = nnx.BatchNorm(out_features, momentum=0.9, rngs=rngs)

    def __call__(self, x, use_running_average):
        x = activate(self.n1(self.c1(x), use_running_average=use_running_average))
        return activate(self.n2(self.c2(x), use_running_average=use_running_average))


class Up(nnx.Module):
    def __init__(self, in_features, out_features, rngs):
        self.upsample = nnx.ConvTranspose(
            in_features, out_features, kernel_size=(2, 2), strides=(2, 2), rngs=rngs
        )
        self.norm = nnx.BatchNorm(out_features, momentum=0.9, rngs=rngs)
        self.fuse = DoubleConv(2 * out_features, out_features, rngs)

    def __call__(self, x, skip, use_running_average):
        x = self.upsample(x)
        x = activate(self.norm(x, use_running_average=use_running_average))
        return self.fuse(jnp.concatenate((skip, x), axis=3), use_running_average)


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, base_features=16, levels=2, rngs):
        sizes = [base_features * 2**level for level in range(levels + 1)]
        self.stem = nnx.Conv(channels, base_features, (3, 3), strides=(2, 2), rngs=rngs)
        self.stem_norm = nnx.BatchNorm(base_features, momentum=0.9, rngs=rngs)
        self.encoder = nnx.List(
            [
                DoubleConv(a, b, rngs)
                for a, b in zip([base_features, *sizes], sizes[:-1], strict=False)
            ]
        )
        self.bridge = DoubleConv(sizes[-2], sizes[-1], rngs)
        self.decoder = nnx.List(
            [Up(a, b, rngs) for a, b in zip(sizes[:0:-1], sizes[-2::-1], strict=True)]
        )
        self.head = nnx.Linear(base_features, num_classes, rngs=rngs)
        # set by train() and eval(), like that of the layers
        self.use_running_average = False

    def __call__(self, x):
        frozen = self.use_running_average
        x = activate(self.stem_norm(self.stem(x), use_running_average=frozen))
        skips = []
        for down in self.encoder:
            x = down(x, frozen)
            skips.append(x)
            x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = self.bridge(x, frozen)
        for up in self.decoder:
            x = up(x, skips.pop(), frozen)
        return self.head(x.mean(axis=(1, 2)))
