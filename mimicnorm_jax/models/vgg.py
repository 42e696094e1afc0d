"""VGG (Simonyan and Zisserman 2015), for ImageNet and, with a small classifier, CIFAR."""

from __future__ import annotations

import jax
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import Dropout
from mimicnorm_jax.methods import Method, Site
from mimicnorm_jax.models.channels import flatten
from mimicnorm_jax.models.pooling import Window
from mimicnorm_jax.models.unit import ConvUnit

STAGE_FEATURES = (64, 128, 256, 512, 512)
STAGE_LAYERS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
HIDDEN_FEATURES = 4096
TOTAL_STRIDE = 32


class Stage(nnx.List[ConvUnit]):
    """Convolutions one after the other."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, H, W, C)`` to ``(B, H / 2, W / 2, C')``."""
        for unit in self:
            x = unit(x)
        return x


class VGG(nnx.Module):
    """3x3 convolutions in five stages, each ended by a max-pool, then three dense layers.

    Args:
      stage_layers: number of convolutions in each stage.
      method: what normalizes the network.
      num_classes: features of the last layer.
      image_size: height and width of the input, a multiple of 32.
      channels: channels of the input.
      width: multiplier of all features but the classes.
      dropout: rate after each of the two hidden dense layers.
      rngs: for the initial values.
    """

    def __init__(
        self,
        stage_layers: tuple[int, ...],
        *,
        method: Method,
        num_classes: int,
        image_size: int,
        channels: int,
        width: float,
        dropout: float = 0.5,
        rngs: nnx.Rngs,
    ):
        if image_size < TOTAL_STRIDE or image_size % TOTAL_STRIDE:
            raise UserError(
                f"vgg needs an image size that is a multiple of {TOTAL_STRIDE}, got {image_size}"
            )
        self.stages = nnx.List[Stage]([])
        features = channels
        for stage_features, layers in zip(STAGE_FEATURES, stage_layers, strict=True):
            units = []
            for index in range(layers):
                first = not self.stages and index == 0
                out = max(1, round(stage_features * width))
                unit = ConvUnit(
                    method,
                    features,
                    out,
                    (3, 3),
                    site=Site("stem" if first else "inner", after_relu=not first),
                    padding=1,
                    pool=Window(window=2, stride=2) if index == layers - 1 else None,
                    rngs=rngs,
                )
                units.append(unit)
                features = out
            self.stages.append(Stage(units))
        self.run = method.run
        features *= (image_size // TOTAL_STRIDE) ** 2
        hidden = max(1, round(HIDDEN_FEATURES * width))
        site = Site("hidden_dense")
        self.hidden = nnx.List(
            [
                method.dense(features, hidden, site=site, rngs=rngs),
                method.dense(hidden, hidden, site=site, rngs=rngs),
            ]
        )
        self.activation = method.activation(site=site)
        self.dropouts = nnx.List([Dropout(dropout, index=0), Dropout(dropout, index=1)])
        self.classifier = method.dense(hidden, num_classes, site=Site("classifier"), rngs=rngs)
        self.head = method.head(num_classes)

    def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Maps normalized images ``(B, H, W, C)`` to logits ``(B, num_classes)``.

        Args:
          images: the input.
          keys: ``(B,)`` PRNG keys for dropout in training, one an example.
        """
        x = images
        for stage in self.stages:
            x = self.run(stage, x)
        x = flatten(x)
        for dense, dropout in zip(self.hidden, self.dropouts, strict=True):
            x = dropout(self.activation(dense(x)), keys)
        return self.head(self.classifier(x))
