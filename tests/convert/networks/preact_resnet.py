"""Pre-activation ResNet (He et al., 2016), the training mode optionally given at the call."""

import jax
from flax import nnx


class PreActBlock(nnx.Module):
    """norm -> relu -> conv, twice; a projection starts from the activated input."""

    def __init__(self, c_in: int, c_out: int, subsample: bool, rngs: nnx.Rngs):
        strides = (2, 2) if subsample else (1, 1)
        self.norm_0 = nnx.BatchNorm(c_in, momentum=0.9, epsilon=1e-5, rngs=rngs)
        # nobody dropped the biases here: the first one comes right before a BatchNorm
        self.conv_0 = nnx.Conv(c_in, c_out, (3, 3), strides, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(c_out, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.conv_1 = nnx.Conv(c_out, c_out, (3, 3), rngs=rngs)
        self.has_projection = subsample or c_in != c_out
        if self.has_projection:
            self.projection = nnx.Conv(c_in, c_out, (1, 1), strides, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool | None = None) -> jax.Array:
        use_running_average = None if train is None else not train
        y = nnx.relu(self.norm_0(x, use_running_average))
        shortcut = self.projection(y) if self.has_projection else x
        y = self.conv_0(y)
        y = nnx.relu(self.norm_1(y, use_running_average))
        y = self.conv_1(y)
        return shortcut + y


class Network(nnx.Module):
    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        *,
        width: float = 1.0,
        stage_sizes: tuple[int, ...] = (2, 3, 2),
        rngs: nnx.Rngs,
    ):
        features = [8 * max(1, round(width * multiple)) for multiple in (1, 2, 4)]
        self.stem = nnx.Conv(channels, features[0], (3, 3), use_bias=False, rngs=rngs)
        self.block_names = []
        c_in = features[0]
        for i, (c_out, size) in enumerate(zip(features, stage_sizes, strict=True)):
            for j in range(size):
                name = f"stage{i}_block{j}"
                setattr(self, name, PreActBlock(c_in, c_out, i > 0 and j == 0, rngs))
                self.block_names.append(name)
                c_in = c_out
        self.final_norm = nnx.BatchNorm(c_in, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(c_in, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool | None = None) -> jax.Array:
        x = self.stem(x)
        for name in self.block_names:
            x = getattr(self, name)(x, train=train)
        use_running_average = None if train is None else not train
        x = self.final_norm(x, use_running_average=use_running_average)
        x = nnx.relu(x)
        x = nnx.avg_pool(x, window_shape=x.shape[1:3])
        return self.head(x.reshape(x.shape[0], -1))
