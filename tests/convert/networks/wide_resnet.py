"""Wide ResNet (Zagoruyko & Komodakis, 2016), with dropout between the convolutions."""

from functools import partial

from flax import nnx

Conv3x3 = partial(
    nnx.Conv,
    kernel_size=(3, 3),
    padding="SAME",
    use_bias=False,
    kernel_init=nnx.initializers.he_normal(),
)
Norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class WideBlock(nnx.Module):
    def __init__(self, inputs, outputs, stride, dropout_rate, *, rngs):
        self.bn1 = Norm(inputs, rngs=rngs)
        self.conv1 = Conv3x3(inputs, outputs, strides=stride, rngs=rngs)
        self.bn2 = Norm(outputs, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.conv2 = Conv3x3(outputs, outputs, strides=1, rngs=rngs)
        self.equal = inputs == outputs and stride == 1
        self.shortcut = (
            (lambda t: t)
            if self.equal
            else Conv3x3(inputs, outputs, kernel_size=(1, 1), strides=stride, rngs=rngs)
        )

    def __call__(self, x):
        h = nnx.relu(self.bn1(x))
        residual = x if self.equal else h
        h = self.conv1(h)
        h = self.conv2(self.dropout(nnx.relu(self.bn2(h))))
        return self.shortcut(residual) + h


def group(inputs, outputs, n, stride, dropout_rate, rngs):
    first = WideBlock(inputs, outputs, stride, dropout_rate, rngs=rngs)
    rest = [WideBlock(outputs, outputs, 1, dropout_rate, rngs=rngs) for _ in range(n - 1)]
    return nnx.Sequential(first, *rest)


class Network(nnx.Module):
    def __init__(
        self, num_classes=10, channels=3, *, width=2, depth=16, dropout_rate=0.1, base=8, rngs
    ):
        assert (depth - 4) % 6 == 0, "depth must be 6 n + 4"
        n = (depth - 4) // 6
        w1, w2, w3 = (base * width * factor for factor in (1, 2, 4))
        # the images shrink in every group, the first included
        self.net = nnx.Sequential(
            Conv3x3(channels, base, rngs=rngs),
            group(base, w1, n, 2, dropout_rate, rngs),
            group(w1, w2, n, 2, dropout_rate, rngs),
            group(w2, w3, n, 2, dropout_rate, rngs),
            Norm(w3, rngs=rngs),
            nnx.relu,
            lambda x: x.mean(axis=(1, 2)),
            nnx.Linear(w3, num_classes, rngs=rngs),
        )

    def __call__(self, images):
        return self.net(images)
