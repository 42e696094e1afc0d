"""VGG with BatchNorm (Simonyan & Zisserman, 2014), average pools and a hidden dense layer."""

import functools

import jax
from flax import nnx

CFG = (16, "A", 32, 32, "A", 64, 64, "A")
pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))


def make_layers(cfg, in_channels, width, rngs):
    layers = []
    for v in cfg:
        if v == "A":
            layers.append(pool)
            continue
        out_channels = 8 * max(1, int(v * width) // 8)
        layers += [
            nnx.Conv(in_channels, out_channels, kernel_size=(3, 3), padding="SAME", rngs=rngs),
            nnx.BatchNorm(num_features=out_channels, momentum=0.9, rngs=rngs),
            jax.nn.relu,
        ]
        in_channels = out_channels
    return layers, in_channels


def flatten(x):
    return x.reshape(x.shape[0], -1)


class Network(nnx.Module):
    def __init__(self, num_classes=10, channels=3, *, width=1.0, hidden=128, rngs):
        layers, out_channels = make_layers(CFG, channels, width, rngs)
        self.features = nnx.Sequential(*layers)
        side = 32 // 2 ** CFG.count("A")
        self.classifier = nnx.Sequential(
            flatten,
            nnx.Linear(side * side * out_channels, hidden, rngs=rngs),
            jax.nn.relu,
            nnx.Dropout(0.3, rngs=rngs),
            nnx.Linear(hidden, hidden, rngs=rngs),
            jax.nn.relu,
            nnx.Dropout(0.3, rngs=rngs),
            nnx.Linear(hidden, num_classes, rngs=rngs),
        )

    def __call__(self, x):
        return self.classifier(self.features(x))
