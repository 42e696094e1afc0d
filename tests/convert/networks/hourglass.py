"""Encoder-decoder classifier with additive FPN skips and one head shared by all pyramid levels."""

import jax
import jax.numpy as jnp
from flax import nnx


class ResBlock(nnx.Module):
    def __init__(self, cin, cout, strides=1, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(cin, cout, (3, 3), strides=strides, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(cout, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(cout, cout, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(cout, momentum=0.9, rngs=rngs)
        if strides != 1 or cin != cout:
            self.proj = nnx.Sequential(
                nnx.Conv(cin, cout, (1, 1), strides=strides, use_bias=False, rngs=rngs),
                nnx.BatchNorm(cout, momentum=0.9, rngs=rngs),
            )
        else:
            self.proj = lambda x: x

    @nnx.remat
    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + self.proj(x))


class Head(nnx.Module):
    """Conv-BN-ReLU tower; the same instance sees every pyramid level."""

    def __init__(self, width, depth=2, *, rngs: nnx.Rngs):
        layers = []
        for _ in range(depth):
            layers += [
                nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs),
                nnx.BatchNorm(width, momentum=0.9, rngs=rngs),
                jax.nn.relu,
            ]
        self.tower = nnx.Sequential(*layers)

    def __call__(self, x):
        return self.tower(x)


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, width=20, rngs: nnx.Rngs):
        self.stem = nnx.Conv(channels, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        dims, cin = (16, 32, 48), 16
        self.encoder = nnx.List([])
        for level, cout in enumerate(dims):
            self.encoder.append(ResBlock(cin, cout, 1 if level == 0 else 2, rngs=rngs))
            cin = cout
        self.lateral = nnx.List([nnx.Conv(d, width, (1, 1), rngs=rngs) for d in dims])
        self.smooth = nnx.List([nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in dims[1:]])
        self.smooth_norm = nnx.List(
            [nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for _ in dims[1:]]
        )
        self.head = Head(width, rngs=rngs)
        self.classifier = nnx.Linear(len(dims) * width, num_classes, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.stem_norm(self.stem(images)))
        feats = []
        for stage in self.encoder:
            x = stage(x)
            feats.append(x)

        *skips, deep = [conv(f) for conv, f in zip(self.lateral, feats, strict=True)]
        pyramid = [deep]
        for i, skip in reversed(list(enumerate(skips))):
            up = jax.image.resize(pyramid[-1], skip.shape, method="bilinear")
            merged = self.smooth[i](skip + up)
            pyramid.append(nnx.relu(self.smooth_norm[i](merged)))

        head = nnx.remat(lambda module, p: module(p))
        pooled = [head(self.head, p).mean(axis=(1, 2)) for p in pyramid]
        return self.classifier(jnp.concatenate(pooled, axis=-1))
