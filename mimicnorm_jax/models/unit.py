"""Convolution, norm, activation: the unit all architectures are made of."""

from __future__ import annotations

import jax
from flax import nnx

from mimicnorm_jax.methods import Method, Site


class ConvUnit(nnx.Module):
    """``activation(norm(conv(x)))``, each asked of the method.

    Args:
      method: what normalizes the network.
      in_features, out_features, kernel_size, strides, padding, feature_group_count: of
        the convolution.
      site: where the unit stands in the network.
      activate: False leaves the activation to the caller, as at a branch's end.
      rngs: for the initial values.
    """

    def __init__(
        self,
        method: Method,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        site: Site,
        strides: int = 1,
        padding: int = 0,
        feature_group_count: int = 1,
        activate: bool = True,
        rngs: nnx.Rngs,
    ):
        self.conv = method.conv(
            in_features,
            out_features,
            kernel_size,
            site=site,
            strides=strides,
            padding=padding,
            feature_group_count=feature_group_count,
            rngs=rngs,
        )
        self.norm = method.norm(out_features, site=site, rngs=rngs)
        self.activation = method.activation(site=site) if activate else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, H, W, in_features)`` to ``(B, H', W', out_features)``."""
        x = self.norm(self.conv(x))
        return x if self.activation is None else self.activation(x)
