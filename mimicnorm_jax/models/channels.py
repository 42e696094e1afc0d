"""What networks do to channels between layers.

Like the pools, these are single-dispatch functions: the same network also runs on the
signals of ``mimicnorm_jax.theory``, which registers its own versions.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.singledispatch
def concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
    """Channels of a, then those of b: ``(B, H, W, A)`` and ``(B, H, W, C)``."""
    return jnp.concatenate([a, b], axis=-1)


@functools.singledispatch
def interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    """Channels a0, b0, a1, b1, …: concatenation and a shuffle in two groups, in one copy.

    Args:
      a: ``(B, H, W, C)``.
      b: the same shape.

    Returns:
      ``(B, H, W, 2 C)``.
    """
    return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)


@functools.singledispatch
def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the second half of the channels of ``(B, H, W, C)``."""
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


@functools.singledispatch
def identity_shortcut(x: jax.Array, *, strides: int, features: int) -> jax.Array:
    """Option A: every ``strides``-th pixel, and zeros for the channels that are missing."""
    # not x[:, ::strides, ::strides], which is a gather where the extents are symbolic
    x = lax.slice(x, (0,) * 4, x.shape, (1, strides, strides, 1))
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


@functools.singledispatch
def flatten(x: jax.Array) -> jax.Array:
    """``(B, H, W, C)`` to ``(B, H W C)``."""
    return x.reshape(x.shape[0], -1)
