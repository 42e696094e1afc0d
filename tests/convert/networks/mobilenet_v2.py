"""MobileNetV2 (Sandler et al., 2018) in the manner of torchvision, for 32x32 images."""

import jax.numpy as jnp
from flax import nnx


def make_divisible(value, divisor=8):
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def relu6(x):
    return jnp.clip(x, 0, 6)


class ConvBNReLU6(nnx.Sequential):
    def __init__(self, cin, cout, kernel=3, stride=1, groups=1, *, rngs):
        super().__init__(
            nnx.Conv(
                cin,
                cout,
                (kernel, kernel),
                strides=(stride, stride),
                padding=(kernel - 1) // 2,
                feature_group_count=groups,
                use_bias=False,
                rngs=rngs,
            ),
            nnx.BatchNorm(cout, momentum=0.9, rngs=rngs),
            relu6,
        )


class InvertedResidual(nnx.Module):
    def __init__(self, cin, cout, stride, expand_ratio, *, rngs):
        hidden = cin * expand_ratio
        self.use_res_connect = stride == 1 and cin == cout
        layers = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU6(cin, hidden, kernel=1, rngs=rngs))
        layers += [
            ConvBNReLU6(hidden, hidden, stride=stride, groups=hidden, rngs=rngs),
            nnx.Conv(hidden, cout, (1, 1), use_bias=False, rngs=rngs),  # linear bottleneck
            nnx.BatchNorm(cout, momentum=0.9, rngs=rngs),
        ]
        self.conv = nnx.Sequential(*layers)

    def __call__(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class Network(nnx.Module):
    # expansion, channels, repeats, first stride
    settings = ((1, 8, 1, 1), (3, 16, 2, 2), (4, 24, 2, 2), (4, 32, 1, 1))

    def __init__(self, num_classes=10, channels=3, *, width=1.0, rngs):
        cin = make_divisible(8 * width)
        last = make_divisible(128 * max(1.0, width))
        features = [ConvBNReLU6(channels, cin, stride=2, rngs=rngs)]
        for t, c, n, s in self.settings:
            cout = make_divisible(c * width)
            for i in range(n):
                features.append(InvertedResidual(cin, cout, s if i == 0 else 1, t, rngs=rngs))
                cin = cout
        features.append(ConvBNReLU6(cin, last, kernel=1, rngs=rngs))
        self.features = nnx.Sequential(*features)
        self.classifier = nnx.Sequential(
            nnx.Dropout(0.1, rngs=rngs), nnx.Linear(last, num_classes, rngs=rngs)
        )

    def __call__(self, x):
        x = self.features(x)
        x = x.mean((1, 2))
        return self.classifier(x)
