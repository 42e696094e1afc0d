"""Fully connected network: the network of the paper's theory (eq. 1)."""

from __future__ import annotations

import jax
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.methods import Function, Method, Site
from mimicnorm_jax.models.channels import flatten


class MLP(nnx.Module):
    """``depth`` dense layers of equal width, ReLU between them.

    Args:
      method: what normalizes the network.
      num_classes: features of the last layer.
      image_size: height and width of the input.
      channels: channels of the input.
      width: multiplier of ``hidden_features``.
      depth: number of dense layers, the classifier included.
      hidden_features: features of the hidden layers.
      rngs: for the initial values.
    """

    def __init__(
        self,
        *,
        method: Method,
        num_classes: int,
        image_size: int,
        channels: int,
        width: float,
        depth: int = 3,
        hidden_features: int = 256,
        rngs: nnx.Rngs,
    ):
        if depth < 2:
            raise UserError(f"mlp needs depth >= 2 (a hidden layer and a classifier), got {depth}")
        features = image_size * image_size * channels
        hidden = max(1, round(hidden_features * width))
        self.layers = nnx.List[Function]([])
        self.norms = nnx.List[Function]([])
        self.activations = nnx.List[Function]([])
        for index in range(depth - 1):
            site = Site("stem" if index == 0 else "inner", after_relu=index > 0)
            self.layers.append(method.dense(features, hidden, site=site, rngs=rngs))
            self.norms.append(method.norm(hidden, site=site, rngs=rngs))
            self.activations.append(method.activation(site=site))
            features = hidden
        self.classifier = method.dense(features, num_classes, site=Site("classifier"), rngs=rngs)
        self.head = method.head(num_classes)

    def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Maps normalized images ``(B, H, W, C)`` to logits ``(B, num_classes)``."""
        x = flatten(images)
        for layer, norm, activation in zip(self.layers, self.norms, self.activations, strict=True):
            x = activation(norm(layer(x)))
        return self.head(self.classifier(x))
