"""SqueezeNet-1.1 / Network-in-Network hybrid: fire modules and a fully convolutional classifier."""

from functools import partial

import jax.numpy as jnp
from flax import nnx

Norm = partial(nnx.BatchNorm, momentum=0.9)


def channel_shuffle(x, groups):
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, groups, c // groups)
    return jnp.transpose(x, (0, 1, 2, 4, 3)).reshape(b, h, w, c)


class Fire(nnx.Module):
    def __init__(self, inplanes, squeeze, expand1x1, expand3x3, *, shuffle=False, rngs):
        self.squeeze = nnx.Conv(inplanes, squeeze, (1, 1), rngs=rngs)
        self.squeeze_bn = Norm(squeeze, rngs=rngs)
        self.expand1x1 = nnx.Conv(squeeze, expand1x1, (1, 1), rngs=rngs)
        self.expand1x1_bn = Norm(expand1x1, rngs=rngs)
        self.expand3x3 = nnx.Conv(squeeze, expand3x3, (3, 3), padding=1, rngs=rngs)
        self.expand3x3_bn = Norm(expand3x3, rngs=rngs)
        self.shuffle = shuffle

    def __call__(self, x):
        x = nnx.hard_swish(self.squeeze_bn(self.squeeze(x)))
        a = nnx.hard_swish(self.expand1x1_bn(self.expand1x1(x)))
        b = nnx.hard_swish(self.expand3x3_bn(self.expand3x3(x)))
        x = jnp.concatenate([a, b], axis=-1)
        return channel_shuffle(x, 2) if self.shuffle else x


pool = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, rngs):
        self.features = nnx.Sequential(
            nnx.Conv(
                channels, 32, (3, 3), strides=2, padding="CIRCULAR", use_bias=False, rngs=rngs
            ),
            Norm(32, rngs=rngs),
            nnx.hard_swish,
            Fire(32, 16, 32, 32, rngs=rngs),
            Fire(64, 16, 32, 32, shuffle=True, rngs=rngs),
            pool,
            Fire(64, 24, 48, 48, rngs=rngs),
            Fire(96, 24, 48, 48, shuffle=True, rngs=rngs),
            pool,
            Fire(96, 32, 64, 64, shuffle=True, rngs=rngs),
            # NIN "cccp" layers: 1x1 convolutions acting as a per-pixel MLP.
            nnx.Conv(128, 96, (1, 1), use_bias=False, rngs=rngs),
            Norm(96, rngs=rngs),
            nnx.hard_swish,
        )
        self.classifier = nnx.Conv(96, num_classes, kernel_size=(1, 1), rngs=rngs)

    def __call__(self, images):
        x = self.features(images)
        return jnp.mean(self.classifier(x), axis=(1, 2))
