"""What the compiler computes when: memory is used again only if it is free by then."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def after(x: jax.Array, result: jax.Array) -> jax.Array:
    """``x`` as it is, but not before ``result`` is there.

    Args:
      x: of any type.
      result: floating-point, at least one element.
    """
    return lax.platform_dependent(x, result, cpu=_by_dependence, default=_by_barrier)


def _by_barrier(x: jax.Array, result: jax.Array) -> jax.Array:
    return lax.optimization_barrier((x, result))[0]


def _by_dependence(x: jax.Array, result: jax.Array) -> jax.Array:
    """For XLA's CPU backend, which takes barriers away before it orders anything.

    It adds a zero of which only ``result`` tells that it is one (or no number, if that is none).
    """
    zero = jnp.minimum(jnp.abs(result[(0,) * result.ndim]), 0)
    return x + zero.astype(x.dtype)
