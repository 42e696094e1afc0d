"""Convolution, norm, pool, activation: the unit all architectures are made of."""

from __future__ import annotations

import jax
from flax import nnx

from mimicnorm_jax.methods import Method, Site
from mimicnorm_jax.models.pooling import Window, max_pool_activated


class ConvUnit(nnx.Module):
    """``max_pool(activation(norm(conv(x))))``, each but the pool asked of the method.

    Args:
      method: what normalizes the network.
      in_features, out_features, kernel_size, strides, padding, feature_group_count: of
        the convolution.
      site: where the unit stands in the network.
      activate: False leaves the activation to the caller, as at a branch's end.
      pool: the max-pool before the activation; None for none.
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
        pool: Window | None = None,
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
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, H, W, in_features)`` to ``(B, H', W', out_features)``."""
        x = self.norm(self.conv(x))
        if self.activation is None:
            return x
        if self.pool is None:
            return self.activation(x)
        return max_pool_activated(x, self.activation, **self.pool._asdict())
