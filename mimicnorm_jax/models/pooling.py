"""Pooling shared by the architectures; single-dispatch as in ``channels``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.singledispatch
def max_pool(x: jax.Array, *, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Max-pool as the maximum over ``window**2`` strided slices.

    Equal to ``lax.reduce_window`` forward, and backward except where two values of a
    window tie. XLA's CPU backend runs the gradient of ``reduce_window`` (select and
    scatter) about 50 times slower than this.

    Args:
      x: ``(B, H, W, C)``.
      window: height and width of the window.
      stride: step of the window along both axes.
      padding: rows and columns of minus infinity added on each side.

    Returns:
      ``(B, H', W', C)`` with ``H' = (H + 2 padding - window) // stride + 1``.
    """
    if padding:
        sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        x = jnp.pad(x, sides, constant_values=-jnp.inf)
    rows = (x.shape[1] - window) // stride + 1
    columns = (x.shape[2] - window) // stride + 1

    def every(start: int, count: int) -> slice:
        return slice(start, start + (count - 1) * stride + 1, stride)

    slices = [
        x[:, every(top, rows), every(left, columns)]
        for top in range(window)
        for left in range(window)
    ]
    return functools.reduce(jnp.maximum, slices)


@functools.singledispatch
def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over height and width: ``(B, H, W, C)`` to ``(B, C)``."""
    return jnp.mean(x, axis=(1, 2))
