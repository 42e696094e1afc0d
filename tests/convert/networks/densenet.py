"""DenseNet-BC (Huang et al., 2017): bottleneck layers, concatenation, halving transitions."""

import jax.numpy as jnp
from flax import nnx
from jax.nn import relu


class DenseLayer(nnx.Module):
    def __init__(self, nin, growth, bn_size, rngs):
        mid = bn_size * growth
        self.norm1 = nnx.BatchNorm(nin, use_running_average=False, momentum=0.9, rngs=rngs)
        self.conv1 = nnx.Conv(nin, mid, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(mid, use_running_average=False, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(mid, growth, (3, 3), use_bias=False, rngs=rngs)

    def __call__(self, x):
        new = self.conv1(relu(self.norm1(x)))
        new = self.conv2(relu(self.norm2(new)))
        return jnp.concatenate([x, new], axis=-1)


class Transition(nnx.Module):
    def __init__(self, nin, nout, rngs):
        self.norm = nnx.BatchNorm(nin, use_running_average=False, momentum=0.9, rngs=rngs)
        self.conv = nnx.Conv(nin, nout, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.conv(relu(self.norm(x)))
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))


class Network(nnx.Module):
    def __init__(
        self, num_classes=10, channels=3, *, growth=8, block_config=(3, 4, 4), bn_size=2, rngs
    ):
        nfeatures = 2 * growth
        self.conv0 = nnx.Conv(channels, nfeatures, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.layers = nnx.List()
        for i, num_layers in enumerate(block_config):
            for _ in range(num_layers):
                self.layers.append(DenseLayer(nfeatures, growth, bn_size, rngs))
                nfeatures += growth
            if i + 1 < len(block_config):
                half = -(-nfeatures // 16) * 8
                self.layers.append(Transition(nfeatures, half, rngs))
                nfeatures = half
        self.norm_last = nnx.BatchNorm(
            nfeatures, use_running_average=False, momentum=0.9, rngs=rngs
        )
        self.fc = nnx.Linear(nfeatures, num_classes, rngs=rngs)

    def features(self, x):
        x = self.conv0(x)
        for layer in self.layers:
            x = layer(x)
        return relu(self.norm_last(x))

    def __call__(self, x):
        return self.fc(self.features(x).mean(axis=(-3, -2)))
