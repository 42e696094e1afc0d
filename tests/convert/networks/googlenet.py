"""GoogLeNet (Szegedy et al., 2015) with BatchNorm; returns logits and auxiliary logits."""

import functools

import jax.numpy as jnp
from flax import nnx

max_pool = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")


class ConvBnRelu(nnx.Module):
    def __init__(self, cin, cout, k, *, rngs):
        self.conv = nnx.Conv(cin, cout, kernel_size=(k, k), use_bias=False, rngs=rngs)
        # no scale: the ReLU is followed by linear layers (as in TF-slim)
        self.bn = nnx.BatchNorm(cout, momentum=0.9, epsilon=1e-3, use_scale=False, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x)))


class Inception(nnx.Module):
    def __init__(self, cin, c1, c3r, c3, c5r, c5, cpool, *, rngs):
        conv = functools.partial(ConvBnRelu, rngs=rngs)
        self.branches = nnx.Dict(
            one=conv(cin, c1, 1),
            three=nnx.Sequential(conv(cin, c3r, 1), conv(c3r, c3, 3)),
            five=nnx.Sequential(conv(cin, c5r, 1), conv(c5r, c5, 5)),
            pool=nnx.Sequential(functools.partial(max_pool, strides=(1, 1)), conv(cin, cpool, 1)),
        )
        self.cout = c1 + c3 + c5 + cpool

    def __call__(self, x):
        return jnp.concatenate([branch(x) for branch in self.branches.values()], axis=-1)


class AuxiliaryHead(nnx.Module):
    def __init__(self, cin, num_classes, *, rngs):
        self.proj = ConvBnRelu(cin, 32, 1, rngs=rngs)
        self.hidden = nnx.Linear(32 * 4, 64, rngs=rngs)
        self.out = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = self.proj(x)
        x = nnx.relu(self.hidden(x.reshape((x.shape[0], -1))))
        return self.out(x)


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, rngs):
        self.stem_conv = nnx.Conv(channels, 16, (3, 3), strides=(2, 2), rngs=rngs)
        self.stem_bn = nnx.BatchNorm(16, momentum=0.9, epsilon=1e-3, rngs=rngs)
        self.reduce = ConvBnRelu(16, 32, 3, rngs=rngs)
        self.inception3a = Inception(32, 16, 16, 24, 8, 8, 8, rngs=rngs)
        self.inception3b = Inception(self.inception3a.cout, 24, 16, 32, 8, 16, 8, rngs=rngs)
        self.inception4a = Inception(self.inception3b.cout, 32, 24, 48, 8, 16, 16, rngs=rngs)
        self.inception4b = Inception(self.inception4a.cout, 32, 32, 48, 8, 16, 16, rngs=rngs)
        self.inception5 = Inception(self.inception4b.cout, 48, 32, 64, 16, 24, 24, rngs=rngs)
        self.aux = AuxiliaryHead(self.inception4a.cout, num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.2, rngs=rngs)
        self.fc = nnx.Linear(self.inception5.cout, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem_bn(nnx.relu(self.stem_conv(x)))  # conv -> relu -> norm here
        x = self.reduce(max_pool(x))
        x = self.inception3b(self.inception3a(x))
        x = self.inception4a(max_pool(x))
        aux_logits = self.aux(x)
        x = self.inception5(self.inception4b(x))
        x = self.dropout(jnp.mean(x, axis=(1, 2)))
        return self.fc(x), aux_logits
