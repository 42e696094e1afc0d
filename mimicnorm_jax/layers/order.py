"""What the compiler computes when: memory is used again only if it is free by then."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def after(x: jax.Array, result: jax.Array) -> jax.Array:
    """``x`` as it is, but not before ``result`` is there.

    On CPUs a floating-point -0 becomes 0, and all becomes NaN if the first number of ``result`` is.

    Args:
      x: numbers of any type.
      result: floating-point; if it is empty, ``x`` waits for nothing.
    """
    return lax.platform_dependent(x, result, cpu=after_on_cpu, default=_by_barrier)


def _by_barrier(x: jax.Array, result: jax.Array) -> jax.Array:
    return lax.optimization_barrier((x, result))[0]


def after_on_cpu(x: jax.Array, result: jax.Array) -> jax.Array:
    """``after`` in a program that only CPUs run: XLA's backend takes barriers away there.

    It adds a zero of which only ``result`` tells that it is one (or no number, if that is none).
    """
    return x + _zero(result).astype(x.dtype) if result.size else x


def _zero(witness: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.abs(witness[(0,) * witness.ndim]), 0)


def materialized(x: jax.Array, witness: jax.Array) -> jax.Array:
    """``x`` as it is, but in memory of its own: never computed again from what it was made of.

    Args:
      x: a number of any type.
      witness: floating-point, at least one element, there before ``x``.
    """
    return lax.platform_dependent(
        x, witness, cpu=_by_loop, default=lambda x, _: lax.optimization_barrier(x)
    )


def _by_loop(x: jax.Array, witness: jax.Array) -> jax.Array:
    """A loop that XLA's CPU backend cannot look through, of no rounds, as the witness knows."""
    rounds = _zero(witness).astype(jnp.int32)
    return lax.while_loop(
        lambda carry: carry[0] > 0, lambda carry: (carry[0] - 1, carry[1] + 1), (rounds, x)
    )[1]
